# SPDX-License-Identifier: Apache-2.0
"""The measurement itself: adapters of every seed, moved by every method to every target."""

import math
import statistics
import traceback
from functools import partial

from . import lm_shapes
from .lm_methods import controls, measured
from .lm_model import EMBEDDING
from .lm_scan import embedding_drift, totals
from .lm_train import clock

SMALLER = ("shallow", "narrow")


class Measurement:
    """Every case of the scale, then targets of another shape, then controls.

    Args:
        lab: the bench; what does not fit its budget is left out, and the log says so.
    """

    def __init__(self, lab):
        self._lab, self._scale = lab, lab.scale
        self._source = {}  # (kind, task) -> adapters by seed
        self._rate = {}

    def run(self):
        """Everything."""
        lab, scale = self._lab, self._scale
        self._part("targets", lab.drifted)
        for kind, task, labels in scale.cases:
            if (kind, task) not in self._source:
                job = partial(self._train_source, kind, task)
                self._part(f"{task}, {kind} on the source", job, 30)
            for label in labels:
                if label not in lab.models:
                    self._part(label, partial(self._other, label), 30)
                self._part(f"{task}, {label}, {kind}", partial(self._pair, label, kind, task), 25)
        if scale.has_shapes:
            self._part("other shapes", self._shapes, 30)
        for kind, task, labels in scale.controls:
            for label in labels:
                job = partial(self._controls, label, kind, task)
                self._part(f"{task}, {label}, {kind}, controls", job)
        lab.close()

    def _other(self, label):
        """A target that was made in another way than the first ones."""
        lab, steps = self._lab, self._scale.others[label]
        if label == "merged":
            lab.merged(label, steps)
        else:
            lab.drifted("generic", {label: steps})

    def _part(self, what, job, reserve=0.0, tidy=True):
        """Do a part if there is time; log what goes wrong in it, and go on with the next."""
        lab = self._lab
        try:
            if lab.late(reserve):
                raise TimeoutError("late")
            job()
        except TimeoutError:
            lab.log(f"late: {what} is left out")
        except Exception:
            lab.log(f"{what} failed:\n{traceback.format_exc()}")
        if tidy:
            lab.flush()
            lab.tidy()

    def _has_row(self, label, task, method):
        return any(
            (row["target"], row["task"], row["method"]) == (label, task, method)
            for row in self._lab.rows
        )

    def _bases(self, label, rank):
        lab = self._lab
        known = lab.facts[label].setdefault("bases_ms", {})
        if rank not in known:
            started = clock()
            lab.models[label].bases(rank)
            known[rank] = round(1e3 * (clock() - started), 1)

    def _form(self, label, kind):
        options = {"rank": self._scale.core} if kind == "lorax" else {}
        return self._lab.form(label, kind, **options)

    def _train_source(self, kind, task):
        """The source's adapters, at the rate that is best for the first seed on other sentences."""
        lab, scale = self._lab, self._scale
        self._none("source", task)
        rates, seeds = scale.rates[kind, task], list(scale.seeds)
        if kind == "lorax":
            self._bases("source", scale.core)
        form = self._form("source", kind)
        tried = seeds[:1] * len(rates) if len(rates) > 1 else seeds
        rate_of = rates if len(rates) > 1 else rates * len(seeds)
        adapters = lab.train("source", form, task, seeds=tried, rates=rate_of)
        self._rate[kind, task] = rates[0]
        if len(rates) > 1:
            losses = [lab.loss("source", task, adapter.factors) for adapter in adapters]
            best = min(range(len(rates)), key=lambda i: (math.isnan(losses[i]), losses[i]))
            chosen = {f"{r:g}": round(x, 4) for r, x in zip(rates, losses, strict=True)}
            lab.facts.setdefault("rates", {})[f"{kind} {task}"] = chosen
            lab.log(f"{kind}, {task}: valid nll by rate {chosen}")
            self._rate[kind, task] = rates[best]
            adapters = [adapters[best]]
            if seeds[1:]:
                again = [rates[best]] * len(seeds[1:])
                adapters += lab.train("source", form, task, seeds=seeds[1:], rates=again)
        self._source[kind, task] = dict(zip(seeds, adapters, strict=True))
        self._rows(
            "source",
            "source",
            kind,
            task,
            {"trained": partial(_given, self._source[kind, task])},
            self._source[kind, task],
        )

    def _own(self, label, kind, task):
        """Adapters trained on a target itself: the ceiling."""
        seeds = list(self._scale.seeds)
        form = self._form(label, kind)
        rates = [self._rate[kind, task]] * len(seeds)
        adapters = self._lab.train(label, form, task, seeds=seeds, rates=rates)
        return dict(zip(seeds, adapters, strict=True))

    def _none(self, label, task):
        if not self._has_row(label, task, "none"):
            row = self._lab.score(label, task, None, method="none")
            self._lab.log(f"  {label} none: {_line([row])}")

    def _rows(self, source, target, kind, task, methods, adapters):
        """Every method for every seed, a line of the log a method."""
        for name, move in methods.items():
            what = f"{task} {kind} {source} -> {target} {name}"
            job = partial(self._method, what, source, target, task, name, move, adapters)
            self._part(what, job, tidy=False)

    def _method(self, what, source, target, task, name, move, adapters):
        rows = []
        for seed, adapter in adapters.items():
            one = {name: partial(move, seed=seed) if name == "trained" else move}
            rows += self._lab.transfer(source, target, task, adapter, one, seed=seed)
        if rows:
            took = statistics.median(row["transfer_ms"] for row in rows)
            self._lab.log(f"  {what}: {_line(rows)}, {took:.0f} ms")

    def _pair(self, label, kind, task):
        lab = self._lab
        if label not in lab.models or (kind, task) not in self._source:
            lab.log(f"no {kind} for {task} or no {label}")
            return
        facts, adapters = lab.facts[label], self._source[kind, task]
        pair = lab.pair("source", label)
        if "embeddings" not in facts:
            for rank in self._scale.ranks:
                self._bases(label, rank)
            facts["embeddings"] = embedding_drift(pair, EMBEDDING)
            lab.log(f"{label}: {facts}")
        if kind == "lorax":
            self._bases(label, self._scale.core)
        self._none(label, task)
        scans = {s: totals(pair, a, self._scale.ranks[-1]) for s, a in adapters.items()}
        facts.setdefault("scan", {})[f"{kind} {task}"] = scans
        moves = measured(kind, self._scale.ranks, facts["embeddings"]["drift"] > 0)
        only = self._scale.only or moves
        moves = {name: move for name, move in moves.items() if name in only}
        moves = {"trained": partial(_given, self._own(label, kind, task))} | moves
        self._rows("source", label, kind, task, moves, adapters)

    def _controls(self, label, kind, task):
        if label in self._lab.models and (kind, task) in self._source:
            self._rows("source", label, kind, task, controls(), self._source[kind, task])

    def _shapes(self):
        lab = self._lab
        adapters = self._source["lora", "enfr"]
        for label in SMALLER:
            lab.pruned((label,))
            if label not in lab.models or lab.late(12):
                lab.log(f"late: {label} is left out")
                return
            source, target = lab.models["source"], lab.models[label]
            started = clock()
            maps = lm_shapes.find_maps(source, target)
            lab.facts[label] |= {
                "maps_ms": round(1e3 * (clock() - started), 1),
                "matched": maps.layers,
                "source_layers": source.shape.layers,
                "likeness": maps.likeness,
            }
            lab.log(f"{label}: {lab.facts[label]}")
            self._none(label, "enfr")
            own = self._own(label, "lora", "enfr")
            moves = {"trained": partial(_given, own)} | _between(maps, label)
            self._rows("source", label, "lora", "enfr", moves, adapters)
            back = maps.reversed(source.shape.layers)
            self._rows(label, "source", "lora", "enfr", _between(back, label), own)
            lab.flush()


def _between(maps, label):
    moves = {
        "aligned": partial(lm_shapes.aligned, maps=maps),
        "aligned, not sized": partial(lm_shapes.aligned, maps=maps, sized=False),
    }
    if label == "shallow":
        moves["by share of depth"] = lm_shapes.by_share
    return moves


def _given(adapters, pair, other, *, seed):
    """An adapter that is there already, called as a method."""
    del pair, other
    return adapters[seed].factors


def _line(rows):
    def mean(key):
        return statistics.mean(row[key] for row in rows)

    spread = f" +- {statistics.stdev(r['nll'] for r in rows):.4f}" if len(rows) > 1 else ""
    return (
        f"nll {mean('nll'):.4f}{spread}, spanish {mean('spanish_nll'):.4f}, "
        f"generic {mean('generic_nll'):.4f}"
    )
