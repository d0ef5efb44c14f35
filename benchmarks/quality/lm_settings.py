# SPDX-License-Identifier: Apache-2.0
"""Search for the settings that the measurement then uses, on the validation split only."""

import traceback
from contextlib import contextmanager
from functools import partial

from .lm_methods import same_shape, sweeps
from .lm_shapes import aligned, find_maps
from .lm_train import clock

RATES = {
    "lora": [5e-4, 1e-3, 2e-3, 4e-3],
    "full": [5e-4, 1e-3, 3e-3, 1e-2],
    "banded": [1e-3, 3e-3, 1e-2, 3e-2],
    "diagonal": [3e-3, 1e-2, 3e-2, 1e-1],
}


def forms(lora_size, layers, shortest):
    """Forms of core to compare: label -> options. `shortest` is the shortest side of any layer."""
    equal = min(shortest, round((lora_size / layers) ** 0.5 / 8) * 8)
    return {
        f"full {equal}": {"rank": equal},
        "full 64": {"rank": 64},
        f"full {equal} a=0.5": {"rank": equal, "sigma_power": 0.5},
        "diagonal 320": {"rank": 320, "core": "diagonal"},
        "banded 320": {"rank": 320, "core": "banded", "band": 12},
        "diagonal 576": {"rank": 576, "core": "diagonal"},
    }


def given(adapter, pair, other):
    """An adapter that is there already, called as a method."""
    del pair, other
    return adapter.factors


@contextmanager
def attempt(lab, what):
    """Log what goes wrong in one candidate, and go on with the next."""
    try:
        yield
    except Exception:
        lab.log(f"{what} failed:\n{traceback.format_exc()}")


class Search:
    """Learning rates and forms on the source, then methods on every target.

    Args:
        lab: the bench.
        rates: learning rates by form, instead of `RATES`.
        only: how many forms of core to try.
    """

    def __init__(self, lab, rates=None, only=None):
        self._lab, self._rates, self._only = lab, rates or RATES, only
        self._forms = {}
        self._best = {}  # (kind, task) -> nll, form, rate, adapter

    def run(self):
        """Everything, most wanted first."""
        lab = self._lab
        for task in ("enfr", "xsum"):
            row = lab.score("source", task, None, split="valid", part="rates", method="none")
            lab.log(f"source alone, {task}: nll {row['nll']:.4f}, {row['score_s']} s")
        size = self._sweep("lora", "r=16", {}, "enfr")
        self._cores(size)
        for (kind, task), (nll, form, rate, _) in self._best.items():
            lab.log(f"best of {kind}, {task}: {form} at {rate:g}, nll {nll:.4f}")
        with attempt(lab, "drift"):
            lab.drifted()
        lab.flush()
        for kind in ("lora", "lorax"):
            if (kind, "enfr") in self._best:
                self._same_shape(kind)
        with attempt(lab, "other shapes"):
            self._other_shapes()
        if not lab.late(15):
            with attempt(lab, "xsum"):
                self._sweep("lora", "r=16", {}, "xsum")
        lab.close()

    def _sweep(self, kind, form, options, task):
        lab = self._lab
        made = lab.form("source", kind, **options)
        rates = self._rates["lora" if kind == "lora" else made.core]
        adapters = lab.train("source", made, task, seeds=[0] * len(rates), rates=rates)
        for rate, adapter in zip(rates, adapters, strict=True):
            about = {"adapter": kind, "form": form, "rate": rate, "size": adapter.size}
            row = lab.score(
                "source",
                task,
                adapter.factors,
                split="valid",
                generate=False,
                skill=False,
                part="rates",
                **about,
            )
            lab.log(f"  {task} {form} rate {rate:g}: nll {row['nll']:.4f}")
            if row["nll"] < self._best.get((kind, task), (float("inf"),))[0]:
                self._best[kind, task] = (row["nll"], form, rate, adapter)
        lab.flush()
        lab.tidy()
        return adapters[0].size

    def _cores(self, size):
        lab, source = self._lab, self._lab.models["source"]
        names = source.shape.module_names()
        self._forms = forms(size, len(names), min(min(source.matrix(n).shape) for n in names))
        for form, options in list(self._forms.items())[: self._only]:
            if lab.late(150):
                lab.log(f"late: {form} is left out")
                continue
            with attempt(lab, form):
                started = clock()
                source.bases(options["rank"])
                lab.log(f"bases of the source at {options['rank']} in {clock() - started:.1f} s")
                self._sweep("lorax", form, options, "enfr")

    def _same_shape(self, kind):
        lab = self._lab
        _, form, rate, adapter = self._best[kind, "enfr"]
        row = lab.score(
            "source", "enfr", adapter.factors, split="valid", part="methods", adapter=kind
        )
        lab.log(f"{kind} {form} on the source: nll {row['nll']:.4f}, {row['score_s']} s")
        for target in lab.scale.targets:
            if target not in lab.models or lab.late(10):
                continue
            row = lab.score(target, "enfr", None, split="valid", part="methods", method="none")
            lab.log(f"  {target} none: {_line(row)}")
            methods = same_shape(kind) | sweeps()
            if kind == "lora" or target == "mid":
                options = self._forms[form] if kind == "lorax" else {}
                with attempt(lab, "the ceiling"):
                    made = lab.form(target, kind, **options)
                    own = lab.train(target, made, "enfr", seeds=[0], rates=[rate])[0]
                    methods = {"trained": partial(given, own)} | methods
            if target != "mid":
                methods.pop("transport k=320", None)
            for name, move in methods.items():
                with attempt(lab, name):
                    self._move("source", target, adapter, name, move, "methods")
            lab.flush()
            lab.tidy()

    def _move(self, source, target, adapter, name, move, part):
        moved = self._lab.transfer(
            source,
            target,
            "enfr",
            adapter,
            {name: move},
            split="valid",
            part=part,
            generate=False,
        )
        for row in moved:
            what = f"{adapter.kind} {source} -> {target} {name}"
            self._lab.log(f"  {what}: {_line(row)}, {row['transfer_ms']:.0f} ms")

    def _other_shapes(self):
        lab = self._lab
        if lab.late(20):
            return
        lab.pruned()
        lab.flush()
        _, _, rate, adapter = self._best["lora", "enfr"]
        for label in ("shallow", "narrow"):
            if label not in lab.models or lab.late(5):
                continue
            own = lab.train(label, lab.form(label, "lora"), "enfr", seeds=[0], rates=[rate])[0]
            for name, factors in (("none", None), ("trained", own.factors)):
                row = lab.score(label, "enfr", factors, split="valid", part="shapes", method=name)
                lab.log(f"  {label} {name}: {_line(row)}")
            if label == "shallow":
                source, target = lab.models["source"], lab.models[label]
                maps = find_maps(source, target)
                lab.log(f"depth matched: {maps.layers}")
                there = partial(aligned, maps=maps)
                back = partial(aligned, maps=maps.reversed(source.shape.layers))
                self._move("source", label, adapter, "aligned", there, "shapes")
                self._move(label, "source", own, "aligned", back, "shapes")
            lab.flush()


def _line(row):
    return (
        f"nll {row['nll']:.4f}, spanish {row['spanish_nll']:.4f}, generic {row['generic_nll']:.4f}"
    )
