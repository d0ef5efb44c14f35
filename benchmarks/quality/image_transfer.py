# SPDX-License-Identifier: Apache-2.0
"""Does a style adapter of a text-to-image model survive the move to a related checkpoint?

A U-Net learns to draw emoji in one style (the source), and is trained on in another style and on
things that it had never seen (the targets, near, mid and far). Adapters for a third style are
trained on the source and moved; adapters trained on a target are the ceiling.

    python benchmarks/quality/image_transfer.py prepare --data emoji.npz     # needs a network
    python benchmarks/quality/image_transfer.py run --data emoji.npz --output DIRECTORY
    python benchmarks/quality/image_report.py DIRECTORY --images docs/images

`--size reduced` runs in five minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import lorax_transfer
from benchmarks.quality import image_adapters as adapters
from benchmarks.quality import image_data, image_methods, image_model
from benchmarks.quality.image_adapters import Adapter, Checkpoint, Factors, Trainable
from benchmarks.quality.image_score import Scorer
from benchmarks.quality.image_sizes import SIZES, Size
from benchmarks.quality.image_training import Data, Run, Schedule, train
from benchmarks.record import save

BASE_STYLE, TARGET_STYLE, ADAPTER_STYLE = "noto", "twemoji", "openmoji"
PICTURES = 16  # kept of each method, for the contact sheet


class Measurement:
    """The run: data, models, scorer and the rows that were found so far."""

    def __init__(self, data: Path, output: Path, size: Size, device: torch.device) -> None:
        self.start = time.perf_counter()
        self.size, self.output, self.device = size, output, device
        on_gpu = device.type == "cuda"
        # Scored in float16: bfloat16 rounds weights by as much as a near target drifts.
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        self.score_dtype = torch.float16 if on_gpu else torch.float32
        self.channels_last = False
        self.rows: list[dict] = []
        self.facts: dict = {"size": asdict(size), "seconds": {}}
        self.pictures: dict[str, np.ndarray] = {}
        self.emoji = image_data.load(data, device, size.side)
        torch.manual_seed(0)
        width = self.emoji.text.shape[-1]
        unet = image_model.build(size.side, size.channels, size.layers, width)
        self.unet = unet.to(device).requires_grad_(False)
        self.layers = image_model.layers_of(self.unet)
        self.facts["parameters"] = sum(p.numel() for p in self.unet.parameters())
        self.say(f"{self.facts['parameters'] / 1e6:.1f} M parameters, {len(self.layers)} layers")

    def say(self, text: str) -> None:
        """Progress, with the seconds since the start."""
        print(f"[{time.perf_counter() - self.start:7.1f}] {text}", flush=True)

    def store(self) -> None:
        """Write what there is: a run that is cut short keeps its rows."""
        self.facts["seconds"]["total"] = time.perf_counter() - self.start
        save(self.output / "images.json", self.rows, **self.facts)
        temporary = self.output / "pictures.tmp.npz"
        np.savez_compressed(temporary, **self.pictures)
        temporary.replace(self.output / "pictures.npz")

    def data(self, style: str, *roles: str) -> Data:
        """Pictures of one style for the names with these roles."""
        rows = self.emoji.indices(*roles)
        return Data(self.emoji.style(style)[rows], self.emoji.text[rows])

    def full_run(self, weights: dict, data: Data, schedule: Schedule, seed: int) -> Run:
        """Training of every weight."""
        parameters = {name: value.detach().clone() for name, value in weights.items()}

        def cast(values: image_model.Weights) -> dict[str, torch.Tensor]:
            return {name: value.to(self.dtype) for name, value in values.items()}

        return Run(self.unet, parameters, cast, data, schedule, seed)

    def laid_out(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The weights in the order in which the device convolves fastest, which casts keep."""
        last = torch.channels_last if self.channels_last else torch.contiguous_format
        return {
            name: value.contiguous(memory_format=last) if value.dim() == 4 else value
            for name, value in weights.items()
        }

    def models(self, folder: Path | None) -> dict[str, Checkpoint]:
        """The source and the targets; trained, or read where an earlier run left them."""
        names = ["source", *self.size.targets]
        if folder is not None and all((folder / f"{n}.safetensors").exists() for n in names):
            found = {
                n: {
                    key: value.to(self.device)
                    for key, value in load_file(folder / f"{n}.safetensors").items()
                }
                for n in names
            }
        else:
            found = self._train_models()
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                for name, weights in found.items():
                    plain = {key: value.contiguous() for key, value in weights.items()}
                    save_file(plain, folder / f"{name}.safetensors")
        drifts = {n: image_model.drift(found["source"], found[n]) for n in names}
        self.facts["drift"] = drifts
        self.say("drift " + " ".join(f"{name} {value:.4f}" for name, value in drifts.items()))
        return {n: Checkpoint(n, self.laid_out(found[n]), self.layers) for n in names}

    def _train_models(self) -> dict[str, dict[str, torch.Tensor]]:
        start = self.laid_out(dict(self.unet.state_dict()))
        known = self.data(BASE_STYLE, "adapt", "test")
        base = self.full_run(start, known, self.size.base, seed=0)
        self.facts["seconds"]["base"] = train([base], "source", self.say)
        found = {"source": base.result()}
        every = self.data(TARGET_STYLE, "adapt", "test", "new")
        runs = {
            name: self.full_run(found["source"], every, schedule, seed=1)
            for name, schedule in self.size.targets.items()
        }
        self.facts["seconds"]["targets"] = train(list(runs.values()), "targets", self.say)
        return found | {name: run.result() for name, run in runs.items()}

    def adapter_run(self, learner: Trainable, schedule: Schedule, seed: int) -> Run:
        """Training of one adapter."""
        data = self.data(ADAPTER_STYLE, "adapt")
        return Run(self.unet, learner.parameters, learner.weights, data, schedule, seed=1000 + seed)

    def learner(self, kind: str, base: Checkpoint, seed: int) -> Trainable:
        """A fresh adapter."""
        return Trainable(kind, base, self.size.rank, seed, self.dtype)


class Evaluation:
    """Scores a model with or without an adapter."""

    def __init__(self, run: Measurement, source: Checkpoint) -> None:
        self.run = run
        size, emoji = run.size, run.emoji
        test = emoji.indices("test")
        self.captions = torch.arange(len(test), device=run.device)[: size.captions]
        self.test = run.data(ADAPTER_STYLE, "test")
        self.new = run.data(ADAPTER_STYLE, "new")
        self.predict = self.predictor(source)
        if not math.isfinite(self.losses(source, {})["loss"]):
            run.say(f"{run.score_dtype} overflows in this model: scored in float32")
            run.score_dtype = torch.float32
            self.predict = self.predictor(source)
        start = time.perf_counter()
        self.scorer = Scorer(emoji, ADAPTER_STYLE, size.judge_steps, size.judge_width)
        run.facts["seconds"]["judge"] = time.perf_counter() - start
        self.real = {}
        for style in emoji.styles:
            everything = torch.arange(len(test), device=run.device)
            self.real[style] = asdict(self.scorer(emoji.style(style)[test], everything))
            self.keep(f"real {style}", emoji.style(style)[test][:PICTURES])
        run.facts["real"] = self.real
        run.facts["captions"] = [emoji.names[i] for i in test[:PICTURES].tolist()]
        run.say(f"real pictures: {self.real}")

    def predictor(self, source: Checkpoint) -> image_model.Predictor:
        """Of one batch size, in the dtype of the scores."""
        weights = adapters.merge(source.weights, {}, self.run.score_dtype)
        shape = tuple(self.run.emoji.text.shape[1:])
        return image_model.Predictor(self.run.unet, weights, self.run.size.batch, shape)

    def keep(self, name: str, images: torch.Tensor) -> None:
        """Keep pictures for the contact sheet."""
        bytes_ = ((images + 1) * 127.5).round().clamp(0, 255).byte()
        self.run.pictures[name] = bytes_.permute(0, 2, 3, 1).cpu().numpy()

    def losses(self, base: Checkpoint, factors: Factors) -> dict[str, float]:
        """Denoising loss on the test pictures of the style, and on those of new things."""
        self.predict.load(adapters.merge(base.weights, factors, self.run.score_dtype))
        draws = self.run.size.draws
        return {
            "loss": image_model.denoising_loss(
                self.predict, self.test.images, self.test.text, draws, seed=7
            ),
            "loss_new": image_model.denoising_loss(
                self.predict, self.new.images, self.new.text, draws, seed=8
            ),
        }

    def __call__(self, base: Checkpoint, factors: Factors, seed: int, **row: object) -> None:
        """Score, and add a row."""
        found = self.losses(base, factors)
        text = self.test.text[self.captions]
        steps = self.run.size.sample_steps
        images = image_model.sample(self.predict, text, steps=steps, guidance=2.0, seed=seed)
        found |= asdict(self.scorer(images, self.captions))
        row = {"pair": base.name, **row, "seed": seed, **found}
        self.run.rows.append(row)
        if seed == 0:
            self.keep(f"{base.name} {row['kind']} {row['method']}", images[:PICTURES])


def one_seed(
    run: Measurement, models: dict[str, Checkpoint], evaluate: Evaluation, seed: int
) -> None:
    """Train this seed's adapters on every model, move the source's, score all."""
    source = models["source"]
    kinds = {"lora": run.size.lora, "lorax": run.size.lorax}
    learners = {
        (kind, name): run.learner(kind, model, seed)
        for kind in kinds
        for name, model in models.items()
    }
    runs = {key: run.adapter_run(each, kinds[key[0]], seed) for key, each in learners.items()}
    seconds = train(list(runs.values()), f"adapters, seed {seed}", run.say)
    run.facts["seconds"][f"adapters, seed {seed}"] = seconds
    trained = {key: learners[key].adapter(each.result()) for key, each in runs.items()}
    del runs, learners
    for name, model in models.items():
        evaluate(model, {}, seed, kind="none", method="none")
        for kind in kinds:
            evaluate(model, trained[kind, name].factors, seed, kind=kind, method="trained")
            if model is source:
                continue
            move = image_methods.Move(source, model, trained[kind, "source"])
            for method, function in image_methods.methods(kind).items():
                factors, ms = image_methods.transfer(move, function)
                evaluate(model, factors, seed, kind=kind, method=method, transfer_ms=ms)
        run.store()
    show(run, seed)
    return {kind: trained[kind, "source"] for kind in kinds}


def show(run: Measurement, seed: int) -> None:
    """Print this seed's rows."""
    for row in run.rows:
        if row["seed"] == seed:
            numbers = " ".join(
                f"{key} {value:.4f}" for key, value in row.items() if isinstance(value, float)
            )
            run.say(f"{row['pair']:7s} {row['kind']:6s} {row['method']:20s} {numbers}")


def scan_all(run: Measurement, models: dict[str, Checkpoint], found: dict[str, Adapter]) -> None:
    """What `lorax-transfer scan` advises for each pair, from files as a user has them."""
    source, layers = models["source"], run.layers
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, model in models.items():
            plain = {key: value.contiguous() for key, value in model.weights.items()}
            save_file(plain, folder / f"{name}.safetensors")
        for kind, adapter in found.items():
            adapters.save_peft(folder / kind, adapter.factors, layers, source.name)
            for name in run.size.targets:
                start = time.perf_counter()
                report = lorax_transfer.scan(
                    folder / kind,
                    folder / "source.safetensors",
                    folder / f"{name}.safetensors",
                    device=str(run.device),
                    cache=folder / "bases",
                )
                advice = report.recommendation
                row = {"pair": name, "kind": kind, "verdict": advice.verdict}
                row |= {"reason": advice.reason, "seconds": time.perf_counter() - start}
                run.facts.setdefault("scan", []).append(row)
                run.say(f"scan {row}")


def time_steps(run: Measurement) -> bool:
    """Milliseconds of a training step of the base; whether channels last are faster."""
    alone = {}
    for channels_last in (False, True):
        run.channels_last = channels_last
        start = run.laid_out(dict(run.unet.state_dict()))
        known = run.data(BASE_STYLE, "adapt", "test")
        for batch, count in ((128, 1), (256, 1), (64, 1), (64, 4)):
            short = Schedule(steps=10, batch=batch, lr=1e-3)
            runs = [run.full_run(start, known, short, seed) for seed in range(count)]
            train(runs, "warm", lambda text: None)
            for each in runs:
                each.schedule = replace(short, steps=60)
            seconds = train(runs, "timed", lambda text: None)
            row = {"channels_last": channels_last, "batch": batch, "runs": count}
            row["ms"] = 1000 * seconds / 50
            run.facts.setdefault("steps", []).append(row)
            run.say(f"step {row}")
            if (batch, count) == (128, 1):
                alone[channels_last] = row["ms"]
    return alone[True] < alone[False]


def sweep(run: Measurement, source: Checkpoint, evaluate: Evaluation, rates: list[float]) -> None:
    """Held-out loss of both kinds of adapter on the source, over learning rates."""
    kinds = {"lora": run.size.lora, "lorax": run.size.lorax}
    learners = {(kind, rate): run.learner(kind, source, 0) for kind in kinds for rate in rates}
    runs = {
        (kind, rate): run.adapter_run(each, replace(kinds[kind], lr=rate), 0)
        for (kind, rate), each in learners.items()
    }
    train(list(runs.values()), "sweep", run.say)
    for (kind, rate), each in runs.items():
        adapter = learners[kind, rate].adapter(each.result())
        found = evaluate.losses(source, adapter.factors)
        run.facts.setdefault("sweep", []).append({"kind": kind, "lr": rate, **found})
        run.say(f"sweep {kind} lr {rate:g} {found}")


def measure(
    data: Path,
    output: Path,
    size: Size,
    *,
    device: str,
    models: Path | None = None,
    budget: float = 1e9,
    rates: list[float] | None = None,
    timed: bool = False,
    scanned: bool = False,
    channels_last: bool = False,
) -> list[dict]:
    """Everything; stops before a seed that would not end within the budget, in seconds."""
    torch.backends.cudnn.benchmark = True
    run = Measurement(data, output, size, torch.device(device))
    if timed:
        channels_last = time_steps(run)
        run.store()
    run.channels_last = run.facts["channels_last"] = channels_last
    checkpoints = run.models(models)
    evaluate = Evaluation(run, checkpoints["source"])
    for name, model in checkpoints.items():
        model.full_bases()
        run.facts["seconds"][f"bases, {name}"] = model.seconds["full"]
    run.say("bases of every model")
    if rates:
        sweep(run, checkpoints["source"], evaluate, rates)
        run.store()
    first: dict[str, Adapter] = {}
    for seed in range(size.seeds):
        start = time.perf_counter()
        found = one_seed(run, checkpoints, evaluate, seed)
        first = first or found
        taken = time.perf_counter() - start
        run.say(f"seed {seed} took {taken:.1f} s")
        if time.perf_counter() - run.start + 1.1 * taken > budget:
            run.say("the budget is spent")
            break
    if scanned:
        scan_all(run, checkpoints, first)
    run.store()
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
    run.add_argument("--output", type=Path, required=True)
    run.add_argument("--size", choices=SIZES, default="full")
    run.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    run.add_argument("--models", type=Path, help="where trained models are kept for another run")
    run.add_argument("--seeds", type=int)
    run.add_argument("--base-steps", type=int)
    run.add_argument("--budget", type=float, default=1e9, help="seconds")
    run.add_argument("--channels-last", action="store_true", help="layout of convolutions")
    run.add_argument("--scan", action="store_true", help="ask the tool what it would do")
    run.add_argument(
        "--time", action="store_true", help="time training steps first, and take the faster layout"
    )
    run.add_argument("--sweep", type=float, nargs="*", help="learning rates to try first")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run one command."""
    options = arguments().parse_args(argv)
    if options.command == "prepare":
        image_data.prepare(options.data, options.archives or options.data.parent)
        return
    size = SIZES[options.size]
    if options.seeds is not None:
        size = replace(size, seeds=options.seeds)
    if options.base_steps is not None:
        size = replace(size, base=replace(size.base, steps=options.base_steps))
    measure(
        options.data,
        options.output,
        size,
        device=options.device,
        models=options.models,
        budget=options.budget,
        rates=options.sweep,
        timed=options.time,
        scanned=options.scan,
        channels_last=options.channels_last,
    )


if __name__ == "__main__":
    main()
