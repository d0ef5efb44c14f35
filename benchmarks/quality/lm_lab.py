# SPDX-License-Identifier: Apache-2.0
"""What every part of the language measurement shares: models, training, scoring, rows, time."""

import gc
import json
import lzma
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import save

from .lm_adapters import Lora, LoraX
from .lm_data import ANSWER, LENGTH, Corpus, Examples, join_model
from .lm_eval import Evaluator
from .lm_methods import Model, Pair
from .lm_model import ATTENTION, drift, load_gguf
from .lm_prune import prune_depth, prune_width
from .lm_train import clock, train_adapters, train_model, windows


@dataclass(frozen=True)
class Scale:
    """How much of everything: the full measurement, or what two cores do in minutes."""

    steps: dict
    batch: dict
    targets: dict  # label -> steps of continued training on Spanish and English
    others: dict  # label -> steps on Wikipedia: "wiki" of all weights, "merged" of a LoRA
    target_rate: float
    target_batch: int
    merged_rate: float
    heal_steps: int
    heal_rate: float
    heal_batch: int
    test: int
    drop_layers: int
    width: int
    ffn: int
    seeds: tuple
    rates: dict  # (kind, task) -> learning rates to choose from
    core: int  # rank of a LoRA-X adapter with full cores
    ranks: tuple  # of the bases that methods project on
    train_length: dict  # longer examples are left out of training, which pads to this
    cases: tuple  # (kind of adapter, task, labels of targets), most wanted first
    has_shapes: bool
    controls: tuple  # the same for parts of the embeddings, which no method takes back
    skill_rows: int  # windows of text that a model's own skill is scored on
    only: tuple = ()  # methods to compare, where not all of them


# A rate that stands alone won on other sentences for the first seed: LoRA of 4e-3 (1.083 nats),
# 8e-3 (1.057) and 1.6e-2 (5.1), LoRA-X of 1e-2 (1.132), 2e-2 (1.149) and 4e-2 (1.410), LoRA on the
# summaries of 1e-3 (2.590) and 3e-3 (2.633).
FULL = Scale(
    steps={"enfr": 240, "xsum": 88},
    batch={"enfr": 64, "xsum": 16},
    targets={"near": 50, "mid": 500, "far": 2000},
    others={"wiki": 500, "merged": 300},
    target_rate=5e-5,
    target_batch=16,
    merged_rate=1e-3,
    heal_steps=500,
    heal_rate=3e-4,
    heal_batch=16,
    test=400,
    drop_layers=7,
    width=448,
    ffn=1152,
    seeds=(0, 1, 2),
    rates={
        ("lora", "enfr"): [8e-3],
        ("lorax", "enfr"): [1e-2],
        ("lora", "xsum"): [1e-3],
        ("lorax", "xsum"): [3e-3, 1e-2],
        ("attention", "enfr"): [8e-3, 1.6e-2],
    },
    core=152,
    ranks=(64, 320),
    train_length={"enfr": 40, "xsum": 256},
    cases=(
        ("lora", "enfr", ("mid", "far", "near")),
        ("lorax", "enfr", ("mid", "far", "near")),
        ("lora", "xsum", ("mid", "far", "near")),
        ("lorax", "xsum", ("mid", "far", "near")),
        ("lora", "enfr", ("wiki", "merged")),
        ("lora", "xsum", ("wiki", "merged")),
        ("attention", "enfr", ("mid", "far", "near")),
    ),
    has_shapes=True,
    controls=(("lora", "enfr", ("mid", "far")), ("lora", "xsum", ("mid", "far"))),
    skill_rows=64,
)
REDUCED = Scale(
    steps={"enfr": 8},
    batch={"enfr": 6},
    targets={"mid": 4},
    others={},
    target_rate=2e-4,
    target_batch=2,
    merged_rate=1e-3,
    heal_steps=12,
    heal_rate=3e-4,
    heal_batch=4,
    test=6,
    drop_layers=7,
    width=448,
    ffn=1152,
    seeds=(0,),
    rates={("lora", "enfr"): [4e-3], ("lorax", "enfr"): [1e-2]},
    core=64,
    ranks=(64,),
    train_length={"enfr": 40},
    cases=(("lora", "enfr", ("mid",)), ("lorax", "enfr", ("mid",))),
    has_shapes=False,
    controls=(),
    skill_rows=1,
    only=("copy", "restore", "restore --embeddings 1", "lorax k=64", "lorax core"),
)
WINDOW = 128


def _packed(lines):
    return lzma.compress("".join(lines).encode())


class Lab:
    """The bench: holds models by label, writes rows as they come, and keeps the time.

    Args:
        folder: what `prepare` wrote.
        output: JSON file of the rows; answers go beside it, `.answers.jsonl.xz`.
        device: "cuda" or "cpu".
        scale: how much of everything.
        budget: seconds after which nothing new is begun.
        source: shape and weights instead of the model in the folder, for tests.
    """

    def __init__(self, folder, output, *, device, scale, budget=float("inf"), source=None):
        self._started = time.perf_counter()
        self._budget = budget
        self.output = Path(output)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self._beside = self.output.with_suffix(".answers.jsonl.xz")
        self._beside.unlink(missing_ok=True)
        self._answers, self._written = [], 0
        self.scale, self.device = scale, torch.device(device)
        self._dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.rows, self.facts, self.models = [], {}, {}
        self._evaluators, self._examples, self._pairs = {}, {}, {}
        self.corpus = Corpus(folder)
        self._decode = self.corpus.decoder()
        shape, weights = source or load_gguf(join_model(folder))
        self.add("source", shape, {n: w.to(self.device) for n, w in weights.items()})
        self.log("model loaded")

    def log(self, text):
        """Print with seconds since the start."""
        print(f"[{time.perf_counter() - self._started:6.1f}] {text}", flush=True)

    def late(self, reserve=0.0):
        """Whether the budget, less a reserve, is spent."""
        return time.perf_counter() - self._started > self._budget - reserve

    def flush(self):
        """Write what there is, so that it can be read whatever ends the run after this."""
        save(self.output, self.rows, facts=self.facts)
        with self._beside.open("ab") as file:  # a stream of its own: xz files may be many
            file.write(_packed(self._answers[self._written :]))
        self._written = len(self._answers)

    def close(self):
        """Write the last of it, and answers as one stream: two thirds of the space of many."""
        self.flush()
        temporary = self._beside.with_suffix(".tmp")
        temporary.write_bytes(_packed(self._answers))
        temporary.replace(self._beside)

    def add(self, label, shape, weights, **facts):
        """Register a model."""
        self.models[label] = Model(label, shape, weights)
        self._pairs = {key: pair for key, pair in self._pairs.items() if label not in key}
        self.facts[label] = facts
        return self.models[label]

    def examples(self, task, split):
        """Examples of a task; not more of them than the scale tests with, unless for training."""
        key = (task, split)
        if key not in self._examples:
            found = self.corpus.examples(task, split)
            if split == "train":
                self._examples[key] = found.at_most(self.scale.train_length[task])
            else:
                self._examples[key] = found.take(self.scale.test)
        return self._examples[key]

    # Models

    def drifted(self, stream="spanish", targets=None):
        """Continued training of the source on a text: the related checkpoints."""
        source, scale = self.models["source"], self.scale
        targets = scale.targets if targets is None else targets
        steps = max(targets.values())
        ids = windows(self.corpus.stream(stream, "train"), WINDOW, steps, scale.target_batch, 0)
        kept, losses, seconds = train_model(
            source.shape,
            source.weights,
            ids,
            rate=scale.target_rate,
            snapshots=set(targets.values()),
            is_late=self.late,
        )
        self.log(f"{steps} steps on {stream} in {seconds:.1f} s, losses {losses}")
        for label, count in targets.items():
            if count in kept:
                self._add_relative(label, kept[count], steps=count, text=stream)

    def merged(self, label, steps, stream="generic"):
        """The source with a LoRA merged in that was trained on a text: another related one."""
        source, scale = self.models["source"], self.scale
        rows = windows(self.corpus.stream(stream, "train"), WINDOW, steps, scale.target_batch, 3)
        rows = rows.reshape(-1, WINDOW).numpy()
        (adapter,), losses, made, seconds = train_adapters(
            source.shape,
            {n: w.to(self._dtype) for n, w in source.weights.items()},
            self.form("source", "lora"),
            Examples(list(rows), np.ones(len(rows), dtype=np.int64)),
            length=WINDOW,
            seeds=[100],
            rates=[scale.merged_rate],
            steps=steps,
            batch=scale.target_batch,
            is_late=self.late,
        )
        self.log(f"{made} steps of a LoRA on {stream} in {seconds:.1f} s, losses {losses}")
        weights = dict(source.weights)
        for name, (B, A) in adapter.factors.items():
            weights[f"{name}.weight"] = weights[f"{name}.weight"] + B @ A
        self._add_relative(label, weights, steps=made, text=stream)

    def _add_relative(self, label, weights, **facts):
        source = self.models["source"]
        change = drift(source.weights, weights, source.shape.module_names())
        self.add(label, source.shape, weights, drift=change, **facts)
        self.log(f"{label}: relative drift {change:.4f}")

    def pruned(self, labels=("shallow", "narrow")):
        """Smaller copies of the source, healed against it."""
        source, scale = self.models["source"], self.scale
        generic = self.corpus.stream("generic", "train")
        spanish = self.corpus.stream("spanish", "train")
        half = scale.heal_batch // 2
        ids = torch.cat(
            [
                windows(generic, WINDOW, scale.heal_steps, half, 1),
                windows(spanish, WINDOW, scale.heal_steps, scale.heal_batch - half, 2),
            ],
            1,
        )
        calibration = ids[:2].reshape(-1, WINDOW).to(self.device)
        for label in labels:
            if label == "shallow":
                shape, weights, kept = prune_depth(
                    source.shape, source.weights, calibration, scale.drop_layers
                )
                facts = {"layers": kept}
            else:
                shape, weights = prune_width(
                    source.shape, source.weights, calibration, scale.width, scale.ffn
                )
                facts = {"hidden": scale.width, "ffn": scale.ffn}
            before = self._text_losses(shape, weights)
            healed, losses, seconds = train_model(
                shape,
                weights,
                ids,
                rate=scale.heal_rate,
                snapshots={scale.heal_steps},
                teacher=(source.shape, source.weights),
                decay=True,
                is_late=self.late,
            )
            if scale.heal_steps not in healed:
                continue
            self.add(label, shape, healed[scale.heal_steps], pruned=before, **facts)
            after = self._text_losses(shape, healed[scale.heal_steps])
            self.facts[label]["healed"] = after
            self.log(f"{label} {facts}: {before} -> {after} in {seconds:.1f} s, KL {losses}")

    def _text_losses(self, shape, weights):
        evaluator = Evaluator(shape, weights)
        streams = {name: self.corpus.stream(name, "valid") for name in ("generic", "spanish")}
        rows = self.scale.skill_rows
        return {n: round(evaluator.text_loss(s, WINDOW, rows), 4) for n, s in streams.items()}

    # Training

    def form(self, label, kind, **options):
        """A form of adapter for a model."""
        model = self.models[label]
        names = model.shape.module_names()
        if kind == "attention":
            names = [n for n in names if n.endswith(ATTENTION)]
            options = {"rank": 8, "kind": kind} | options
        if kind != "lorax":
            return Lora({n: tuple(model.matrix(n).shape) for n in names}, **options)
        bases = model.bases(options.pop("rank"))
        return LoraX(bases, **options).prepare(self.device, self._dtype)

    def train(self, label, form, task, *, seeds, rates, steps=None):
        """Adapters of one form on one model and task, side by side."""
        model, scale = self.models[label], self.scale
        started = clock()
        adapters, losses, made, seconds = train_adapters(
            model.shape,
            {n: w.to(self._dtype) for n, w in model.weights.items()},
            form,
            self.examples(task, "train"),
            length=scale.train_length[task],
            seeds=seeds,
            rates=rates,
            steps=steps or scale.steps[task],
            batch=scale.batch[task],
            is_late=self.late,
        )
        self.log(
            f"trained {len(seeds)} x {form.kind} ({adapters[0].size} numbers) on {label}, {task}: "
            f"{made} steps in {seconds:.1f} s ({clock() - started:.1f} s in all), "
            f"loss {[round(x, 3) for x in losses]}"
        )
        return adapters

    # Scoring

    def evaluator(self, label):
        """The evaluator of the model's shape."""
        model = self.models[label]
        if model.shape not in self._evaluators:
            self._evaluators[model.shape] = Evaluator(model.shape, model.weights)
        return self._evaluators[model.shape]

    def loss(self, label, task, factors, split="valid"):
        """Loss on the answers alone, for choosing settings; no row."""
        evaluator = self.evaluator(label)
        evaluator.load(self.models[label].weights, factors)
        return evaluator.answer_loss(self.examples(task, split), LENGTH[task])

    def score(self, label, task, factors, *, split="test", generate=True, skill=True, **row):
        """Score a model with an update, and add the row."""
        started = clock()
        evaluator = self.evaluator(label)
        evaluator.load(self.models[label].weights, factors)
        examples = self.examples(task, split)
        row = {"target": label, "task": task, "split": split, **row}
        row["nll"] = evaluator.answer_loss(examples, LENGTH[task])
        if skill:
            rows = self.scale.skill_rows
            for name in ("spanish", "generic"):
                stream = self.corpus.stream(name, "valid")
                row[f"{name}_nll"] = evaluator.text_loss(stream, WINDOW, rows)
        if generate:
            answers = [self._decode(a) for a in evaluator.answers(examples, ANSWER[task])]
            self._answers.append(json.dumps({"row": len(self.rows), "answers": answers}) + "\n")
        row["score_s"] = round(clock() - started, 3)
        self.rows.append(row)
        return row

    def transfer(self, source, target, task, adapter, methods, **row):
        """Move an adapter by every method and score each; yields the rows."""
        pair = self.pair(source, target)
        for name, move in methods.items():
            if self.late():
                return
            started, known = clock(), pair.saved
            factors = move(pair, adapter)
            took = clock() - started + pair.saved - known
            row["transfer_ms"] = round(1e3 * took, 2)
            made = {"source": source, "adapter": adapter.kind, "method": name}
            yield self.score(target, task, factors, **made, **row)

    def pair(self, source, target):
        """Two models, and what was found of them."""
        key = source, target
        if key not in self._pairs:
            self._pairs[key] = Pair(*(self.models[label] for label in key))
        return self._pairs[key]

    def tidy(self):
        """Give graph memory back."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
