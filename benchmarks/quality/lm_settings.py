# SPDX-License-Identifier: Apache-2.0
"""Search for the settings that the measurement then uses, on the validation split only."""

from functools import partial

from .lm_lab import Lab
from .lm_methods import Pair, by_depth, match_depth, same_shape, sweeps
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


def search(lab: Lab, *, rates=None, only=None):
    """Learning rates and forms on the source, then methods and their settings on each target."""
    rates = rates or RATES
    best = {}

    def sweep(kind, label, form, task):
        tried = rates["lora" if kind == "lora" else form.core]
        adapters = lab.train("source", form, task, seeds=[0] * len(tried), rates=tried)
        for rate, adapter in zip(tried, adapters, strict=True):
            row = lab.score(
                "source",
                task,
                adapter.factors,
                split="valid",
                generate=False,
                skill=False,
                part="rates",
                adapter=kind,
                form=label,
                rate=rate,
                size=adapter.size,
            )
            lab.log(f"  {task} {label} rate {rate:g}: nll {row['nll']:.4f}")
            key = (kind, task)
            if key not in best or row["nll"] < best[key][0]:
                best[key] = (row["nll"], label, rate, adapter)
        lab.flush()
        lab.tidy()
        return adapters[0].size

    row = lab.score("source", "enfr", None, split="valid", part="rates", method="none")
    lab.log(f"source alone: nll {row['nll']:.4f}, {row['score_s']} s")
    row = lab.score("source", "xsum", None, split="valid", part="rates", method="none")
    lab.log(f"source alone, xsum: nll {row['nll']:.4f}, {row['score_s']} s")
    size = sweep("lora", "r=16", lab.form("source", "lora"), "enfr")
    source = lab.models["source"]
    names = source.shape.module_names()
    shortest = min(min(source.matrix(n).shape) for n in names)
    options = forms(size, len(names), shortest)
    if only:
        options = {label: options[label] for label in list(options)[:only]}
    for label, choice in options.items():
        if lab.late(150):
            lab.log("the rest of the forms is left out: late")
            break
        started = clock()
        source.bases(choice["rank"])
        lab.log(f"bases of the source at {choice['rank']} in {clock() - started:.1f} s")
        sweep("lorax", label, lab.form("source", "lorax", **choice), "enfr")
    for key, (nll, label, rate, _) in best.items():
        lab.log(f"best {key}: {label} at {rate:g}, nll {nll:.4f}")

    lab.drifted()
    lab.flush()
    targets = [t for t in lab.scale.targets if t in lab.models]
    for kind in ("lora", "lorax"):
        _, label, rate, adapter = best[kind, "enfr"]
        row = lab.score(
            "source",
            "enfr",
            adapter.factors,
            split="valid",
            part="methods",
            adapter=kind,
            method="on the source",
        )
        lab.log(f"{kind} {label} on the source: nll {row['nll']:.4f}, {row['score_s']} s")
        for target in targets:
            if lab.late(10):
                break
            none = lab.score(target, "enfr", None, split="valid", part="methods", method="none")
            lab.log(
                f"  {target} none: {none['nll']:.4f}, spanish {none['spanish_nll']:.4f}, "
                f"generic {none['generic_nll']:.4f}"
            )
            methods = same_shape(kind) | sweeps()
            if kind == "lora" or target == "mid":
                choice = options.get(label, {}) if kind == "lorax" else {}
                form = lab.form(target, kind, **choice)
                ceiling = lab.train(target, form, "enfr", seeds=[0], rates=[rate])[0]
                methods = {"trained": partial(given, ceiling)} | methods
            if target != "mid":
                methods.pop("transport k=320", None)
            for row in lab.transfer(
                "source",
                target,
                "enfr",
                adapter,
                methods,
                split="valid",
                part="methods",
                generate=False,
            ):
                lab.log(
                    f"  {kind} -> {target} {row['method']}: {row['nll']:.4f}, spanish "
                    f"{row['spanish_nll']:.4f}, generic {row['generic_nll']:.4f}, "
                    f"{row['transfer_ms']:.0f} ms"
                )
            lab.flush()
            lab.tidy()

    if not lab.late(20):
        lab.pruned()
        lab.flush()
    _, _, rate, adapter = best["lora", "enfr"]
    for label in ("shallow", "narrow"):
        if label not in lab.models or lab.late(5):
            continue
        own = lab.train(label, lab.form(label, "lora"), "enfr", seeds=[0], rates=[rate])[0]
        none = lab.score(label, "enfr", None, split="valid", part="shapes", method="none")
        top = lab.score(label, "enfr", own.factors, split="valid", part="shapes", method="trained")
        lab.log(f"{label}: none {none['nll']:.4f}, trained {top['nll']:.4f}")
        if label == "shallow":
            pair = Pair(lab.models["source"], lab.models[label])
            lab.log(f"depth matched: {match_depth(pair.source, pair.target)}")
            for source, target, moved in (("source", label, adapter), (label, "source", own)):
                for row in lab.transfer(
                    source,
                    target,
                    "enfr",
                    moved,
                    {"copy by depth": by_depth},
                    split="valid",
                    part="shapes",
                ):
                    lab.log(f"  {source} -> {target} {row['method']}: {row['nll']:.4f}")
        lab.flush()
    if not lab.late(15):
        sweep("lora", "r=16", lab.form("source", "lora"), "xsum")
    lab.close()
