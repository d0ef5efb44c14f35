# SPDX-License-Identifier: Apache-2.0
"""Does a style adapter of a text-to-image model survive the move to a related checkpoint?

A U-Net learns to draw emoji in one style (the source), and is trained on in another style and on
things that it had never seen (the targets, near, mid and far). Adapters for a third style are
trained on the source and moved; adapters trained on a target are the ceiling.

    python benchmarks/quality/image_transfer.py prepare --data emoji.npz     # needs a network
    python benchmarks/quality/image_transfer.py run --data emoji.npz --output DIRECTORY
    python benchmarks/quality/image_transfer.py scan --output DIRECTORY
    python benchmarks/quality/image_transfer.py noise --data emoji.npz --output DIRECTORY
    python benchmarks/quality/image_report.py DIRECTORY --images docs/images

`--size reduced` is for two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from benchmarks.quality import image_data, image_methods, image_model, image_noise, image_scan
from benchmarks.quality.image_adapters import Adapter, Checkpoint, Trainable, stored
from benchmarks.quality.image_evaluation import PICTURES, Evaluation
from benchmarks.quality.image_sizes import SIZES, Size
from benchmarks.quality.image_training import Data, Run, Schedule, train
from benchmarks.record import save

BASE_STYLE, TARGET_STYLE, ADAPTER_STYLE = "noto", "twemoji", "openmoji"
KNOWN = ("adapt", "tune", "test")  # what the source is taught
KINDS = ("lora", "lorax")


class Measurement:
    """The run: data, models, and what was found so far."""

    def __init__(self, data: Path, output: Path, size: Size, device: torch.device) -> None:
        self.start = time.perf_counter()
        self.size, self.output, self.device = size, output, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.rows: list[dict] = []
        self.log: list[str] = []
        self.facts: dict = {"size": asdict(size), "seconds": {}, "steps": {}}
        self.adapters: dict[str, torch.Tensor] = {}
        self.emoji = image_data.load(data, device, size.side)
        torch.manual_seed(0)
        width = self.emoji.text.shape[-1]
        unet = image_model.build(size.side, size.channels, size.layers, width)
        self.unet = unet.to(device).requires_grad_(False)
        self.layers = image_model.layers_of(self.unet)
        self.packed = image_model.Packed(self.unet.state_dict())
        self.adapter, self.rates = size.adapter, {kind: size.rates[kind][0] for kind in KINDS}
        self.facts["parameters"] = sum(p.numel() for p in self.unet.parameters())
        self.say(f"{self.facts['parameters'] / 1e6:.1f} M parameters, {len(self.layers)} layers")

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.start

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        self.log.append(f"[{self.elapsed:7.1f}] {text}")
        print(self.log[-1], flush=True)

    def store(self, pictures: dict[str, np.ndarray]) -> None:
        """Write what there is: a run that is cut short keeps its rows."""
        self.facts["seconds"]["total"] = self.elapsed
        save(self.output / "images.json", self.rows, **self.facts, log=self.log)
        temporary = self.output / "pictures.tmp.npz"
        np.savez_compressed(temporary, **cast(dict[str, Any], pictures))
        temporary.replace(self.output / "pictures.npz")
        if self.adapters:
            save_file(self.adapters, self.output / "adapters.safetensors")

    def data(self, style: str, *roles: str) -> Data:
        """Pictures of one style for the names with these roles."""
        rows = self.emoji.indices(*roles)
        return Data(self.emoji.style(style)[rows], self.emoji.text[rows])

    def full_run(self, weights: dict, data: Data, schedule: Schedule, seed: int) -> Run:
        """Training of every weight, from weights of any dtype."""

        def realise(parameters: image_model.Weights) -> dict[str, torch.Tensor]:
            return self.packed.unpack(parameters["all"].to(self.dtype))

        parameters = {"all": self.packed.pack(weights)}
        return Run(self.unet, parameters, realise, data, schedule, seed)

    def models(self, folder: Path) -> dict[str, Checkpoint]:
        """The source and the targets; trained, or read where an earlier run left them."""
        names = ["source", *self.size.targets]
        if all((folder / f"{name}.safetensors").exists() for name in names):
            found = {
                name: load_file(folder / f"{name}.safetensors", str(self.device)) for name in names
            }
        else:
            found = self._train_models()
            folder.mkdir(parents=True, exist_ok=True)
            for name, weights in found.items():
                save_file(weights, folder / f"{name}.safetensors")
        found = {
            name: {key: value.float() for key, value in weights.items()}
            for name, weights in found.items()
        }
        drifts = {n: image_model.drift(found["source"], found[n]) for n in names}
        self.facts["drift"] = drifts
        self.say("drift " + " ".join(f"{name} {value:.4f}" for name, value in drifts.items()))
        return {n: Checkpoint(n, found[n], self.layers) for n in names}

    def _train_models(self) -> dict[str, dict[str, torch.Tensor]]:
        known = self.data(BASE_STYLE, *KNOWN)
        base = self.full_run(self.unet.state_dict(), known, self.size.base, seed=0)
        self.facts["seconds"]["base"] = train([base], "source", self.say)
        self.facts["steps"]["base"] = base.schedule.steps
        found = {"source": self._trained(base)}
        every = self.data(TARGET_STYLE, *KNOWN, "new")
        runs = {
            name: self.full_run(found["source"], every, schedule, seed=1)
            for name, schedule in self.size.targets.items()
        }
        self.facts["seconds"]["targets"] = train(list(runs.values()), "targets", self.say)
        return found | {name: self._trained(run) for name, run in runs.items()}

    def _trained(self, run: Run) -> dict[str, torch.Tensor]:
        weights = self.packed.unpack(run.result()["all"])
        # As checkpoints are published. The targets' training goes on from what is kept, so that
        # drift is what they learnt; far below it is the rounding (2e-4).
        return {name: value.half() for name, value in weights.items()}

    def train_adapters(
        self, wanted: dict[tuple, tuple[str, Checkpoint, float]], schedule: Schedule, seed: int
    ) -> dict[tuple, Adapter]:
        """Adapters side by side; `wanted` has the kind, base and learning rate of each."""
        data = self.data(ADAPTER_STYLE, "adapt")
        learners, runs = {}, {}
        for key, (kind, base, rate) in wanted.items():
            learner = Trainable(kind, base, self.size.rank, seed, self.dtype)
            own = replace(schedule, lr=rate)
            learners[key] = learner
            runs[key] = Run(
                self.unet, learner.parameters, learner.weights, data, own, seed=1000 + seed
            )
        label = f"{len(runs)} adapters"
        taken = train(list(runs.values()), label, self.say)
        steps = next(iter(runs.values())).schedule.steps
        self.say(f"{label}: {1000 * taken / steps / len(runs):.2f} ms a step of one")
        if schedule is self.adapter:
            self.facts["steps"]["adapter"] = steps
            # All seeds train as long as the first.
            self.adapter = replace(schedule, steps=steps, seconds=math.inf)
        return {key: learners[key].adapter(run.result()) for key, run in runs.items()}


def tune(run: Measurement, source: Checkpoint, evaluate: Evaluation) -> None:
    """Choose the learning rate of each kind, on the source, by pictures that are not scored on."""
    choices = {kind: rates for kind, rates in run.size.rates.items() if len(rates) > 1}
    wanted = {
        (kind, rate): (kind, source, rate) for kind, rates in choices.items() for rate in rates
    }
    if not wanted:
        return
    short = replace(run.size.adapter, steps=run.size.tuning)
    trained = run.train_adapters(wanted, short, seed=100)
    losses = {key: evaluate.loss(source, each.factors, "tune") for key, each in trained.items()}
    for kind, rates in choices.items():
        run.rates[kind] = min(rates, key=lambda rate: losses[kind, rate])
    run.facts["tuning"] = [
        {"kind": kind, "lr": rate, "loss": loss} for (kind, rate), loss in losses.items()
    ]
    run.say(f"rates {run.rates} of {losses}")


def one_seed(
    run: Measurement,
    models: dict[str, Checkpoint],
    evaluate: Evaluation,
    seed: int,
    without: Sequence[str] = (),
) -> None:
    """Train this seed's adapters on every model, move the source's, score all."""
    source = models["source"]
    wanted = {
        (kind, name): (kind, model, run.rates[kind])
        for name, model in models.items()
        for kind in KINDS
    }
    start = run.elapsed
    trained = run.train_adapters(wanted, run.adapter, seed)
    run.facts["seconds"][f"adapters, seed {seed}"] = run.elapsed - start
    for kind in KINDS:
        run.adapters |= stored(trained[kind, "source"], f"{seed}.{kind}")

    def score(base: Checkpoint, adapter: str, method: str, factors: dict, **more: float) -> None:
        found = evaluate(base, factors, seed, f"{base.name} {adapter} {method}")
        row = {"pair": base.name, "kind": adapter, "method": method, "seed": seed}
        run.rows.append(row | more | found)

    for name, model in models.items():
        score(model, "none", "none", {})
        for kind in KINDS:
            score(model, kind, "trained", trained[kind, name].factors)
            if model is source:
                continue
            move = image_methods.Move(source, model, trained[kind, "source"])
            for method, function in image_methods.methods(kind).items():
                if method in without:
                    continue
                if not any(row["method"] == method and row["kind"] == kind for row in run.rows):
                    function(move)  # the first call of a method compiles what it needs
                factors, ms = image_methods.transfer(move, function)
                score(model, kind, method, factors, transfer_ms=ms)
        run.store(evaluate.pictures)
    show(run, seed)


def show(run: Measurement, seed: int) -> None:
    """Print this seed's rows."""
    for row in run.rows:
        if row["seed"] == seed:
            text = f"{row['pair']:6s} {row['kind']:5s} {row['method']:18s} "
            for key in ("loss", "loss_new", "style", "content", "kid"):
                text += f"{key} {row[key]:.4f} "
            print(text, flush=True)


def measure(
    data: Path,
    output: Path,
    size: Size,
    *,
    device: str,
    models: Path | None = None,
    budget: float = 1e9,
    without: Sequence[str] = (),
) -> list[dict]:
    """Everything; stops before a seed that would not end within the budget, in seconds.

    Methods named in `without` are left out.
    """
    known = {method for kind in KINDS for method in image_methods.methods(kind)}
    if unknown := sorted(set(without) - known):
        raise SystemExit(f"no method {unknown[0]!r}; known are {', '.join(sorted(known))}.")
    torch.backends.cudnn.benchmark = True
    run = Measurement(data, output, size, torch.device(device))
    checkpoints = run.models(models or output / "models")
    source = checkpoints["source"]
    evaluate = Evaluation(run.unet, run.emoji, size, source, ADAPTER_STYLE, run.say)
    run.facts["real"], run.facts["seconds"]["judge"] = evaluate.real, evaluate.seconds
    test = run.emoji.indices("test")[:PICTURES].tolist()
    run.facts["captions"] = [run.emoji.names[i] for i in test]
    for name, model in checkpoints.items():
        model.full_bases()
        run.facts["seconds"][f"bases, {name}"] = model.seconds["full"]
    run.say("bases of every model")
    tune(run, source, evaluate)
    run.facts["rates"] = run.rates
    for seed in size.seeds:
        start = run.elapsed
        one_seed(run, checkpoints, evaluate, seed, without)
        taken = run.elapsed - start
        run.say(f"seed {seed} took {taken:.1f} s")
        if run.elapsed + taken > budget:
            if seed != size.seeds[-1]:
                run.say("no further seed fits into the budget")
            break
    run.store(evaluate.pictures)
    return run.rows


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="fetch and draw the pictures")
    prepare.add_argument("--data", type=Path, required=True)
    prepare.add_argument("--archives", type=Path, help="where the npm archives are kept")
    run = commands.add_parser("run", help="train, move and score")
    run.add_argument("--data", type=Path, required=True)
    run.add_argument("--models", type=Path, help="where models are kept; by default with the rest")
    run.add_argument("--size", choices=SIZES, default="full")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--seeds", type=int, nargs="+", help="of adapters, one after another")
    rates = ("LORA", "LORAX")
    run.add_argument("--rates", type=float, nargs=2, metavar=rates, help="known learning rates")
    run.add_argument("--without", nargs="+", default=[], metavar="METHOD", help="left out")
    run.add_argument("--budget", type=float, default=1e9, help="seconds")
    scan = commands.add_parser("scan", help="ask the tool what it would do")
    noise = commands.add_parser("noise", help="compare methods picture by picture")
    noise.add_argument("--data", type=Path, required=True)
    for command in (run, scan, noise):
        command.add_argument("--output", type=Path, required=True)
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    options = arguments().parse_args(argv)
    if options.command == "prepare":
        image_data.prepare(options.data, options.archives or options.data.parent)
        return
    if options.command == "scan":
        image_scan.scan(options.output)
        return
    if options.command == "noise":
        image_noise.noise(options.data, options.output, ADAPTER_STYLE)
        return
    size = SIZES[options.size]
    if options.device == "cpu" and options.size != "full":
        # Layers this small are slower on two threads, and ten times slower beside other work.
        torch.set_num_threads(1)
    if options.seeds is not None:
        size = replace(size, seeds=tuple(options.seeds))
    if options.rates is not None:
        pairs = zip(KINDS, options.rates, strict=True)
        given: dict[str, tuple[float, ...]] = {kind: (rate,) for kind, rate in pairs}
        size = replace(size, rates=given)
    measure(
        options.data,
        options.output,
        size,
        device=options.device,
        models=options.models,
        budget=options.budget,
        without=options.without,
    )


if __name__ == "__main__":
    main()
