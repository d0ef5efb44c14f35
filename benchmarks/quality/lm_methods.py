# SPDX-License-Identifier: Apache-2.0
"""Ways to move an adapter's factors, all called the same: `move(pair, adapter) -> factors`."""

import warnings
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial

import torch

import lorax_kernels as lk
from lorax_transfer.settings import restored_share

from .lm_embeddings import INPUT, OUTPUT, beside, leading, met, rows, untaught, whole
from .lm_model import EMBEDDING, drift
from .lm_scan import moved_by

# Relative drift up to which all of it is taken back by `restore_by_drift`.
DRIFT_RESTORED = 0.008


@dataclass
class Model:
    """One model: its shape, its float32 weights, and the bases that were asked for."""

    label: str
    shape: object
    weights: dict
    _bases: dict = field(default_factory=dict)

    def matrix(self, name):
        """Weight of a linear layer."""
        return self.weights[f"{name}.weight"]

    def bases(self, rank):
        """Truncated SVD of every linear layer, at `rank` or the layer's own shorter side."""
        if rank not in self._bases:
            names = self.shape.module_names()
            found = {}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", lk.ConvergenceWarning)
                for k in {min(rank, *self.matrix(n).shape) for n in names}:
                    these = [n for n in names if min(rank, *self.matrix(n).shape) == k]
                    svds = lk.truncated_svd([self.matrix(n) for n in these], k)
                    found |= dict(zip(these, svds, strict=True))
            self._bases[rank] = {n: found[n] for n in names}
        return self._bases[rank]


@dataclass(frozen=True)
class Pair:
    """Where an adapter comes from and where it goes."""

    source: Model
    target: Model


def _lists(adapter):
    names = list(adapter.factors)
    B, A = zip(*(adapter.factors[n] for n in names), strict=True)
    return names, [b.contiguous() for b in B], [a.contiguous() for a in A]


def _named(names, moved):
    return {n: (b, a) for n, b, a in zip(names, *moved, strict=True)}


def copy(pair, adapter, *, scale=1.0):
    del pair
    return {n: (scale * B, A) for n, (B, A) in adapter.factors.items()}


def subspace(pair, adapter, *, method, rank):
    """One of `lk.METHODS` at a rank."""
    names, B, A = _lists(adapter)
    source, target = pair.source.bases(rank), pair.target.bases(rank)
    moved = lk.transfer_lora(B, A, [target[n] for n in names], [source[n] for n in names], method)
    return _named(names, moved)


def cores(pair, adapter):
    """LoRA-X's own transfer: the core, between bases of its own rank."""
    rank = max(core.shape[0] for core in adapter.cores.values())
    source, target = pair.source.bases(rank), pair.target.bases(rank)
    out = {}
    for name, core in adapter.cores.items():
        moved = lk.transfer_core(core, source[name], target[name])
        out[name] = (target[name].U @ moved, target[name].V.mT)
    return out


def index_copy(pair, adapter, *, rank):
    """Coordinates copied index by index, as published for unequal shapes."""
    source, target = pair.source.bases(rank), pair.target.bases(rank)
    out = {}
    for name, (B, A) in adapter.factors.items():
        s, t = source[name], target[name]
        k = min(s.rank, t.rank)
        out[name] = (t.U[:, :k] @ (s.U[:, :k].mT @ B), (A @ s.V[:, :k]) @ t.V[:, :k].mT)
    return out


def anchor(pair, adapter, *, sides, strength=1.0, rank=None):
    names, B, A = _lists(adapter)
    source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
    moved = lk.anchor_lora(B, A, source, target, sides=sides, strength=strength, rank=rank)
    return _named(names, moved)


def restore(pair, adapter, *, directions, strength=1.0):
    names, B, A = _lists(adapter)
    source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
    moved = lk.restore_lora(B, A, source, target, directions=directions, strength=strength)
    return _named(names, moved)


def share_by_drift(pair):
    """How much of the drift to take back: all of a small one, ever less of a larger one."""
    change = drift(pair.source.weights, pair.target.weights, pair.source.shape.module_names())
    return min(1.0, (DRIFT_RESTORED / max(change, 1e-12)) ** 2)


def restore_by_drift(pair, adapter, *, directions):
    return restore(pair, adapter, directions=directions, strength=share_by_drift(pair))


def anchor_and_restore(pair, adapter, *, directions):
    """Anchor both sides, then take back a share of the drift that is left, by its size."""
    moved = anchor(pair, adapter, sides="both", rank=2 * _rank(adapter))
    names, B, A = _lists(adapter)
    B_new, A_new = (list(x) for x in zip(*(moved[n] for n in names), strict=True))
    source = [pair.source.matrix(n) for n in names]
    left = [
        pair.target.matrix(n) + b @ a - old_b @ old_a
        for n, b, a, old_b, old_a in zip(names, B_new, A_new, B, A, strict=True)
    ]
    strength = share_by_drift(pair)
    again = lk.restore_lora(B_new, A_new, source, left, directions=directions, strength=strength)
    return _named(names, again)


def _rank(adapter):
    return next(iter(adapter.factors.values()))[0].shape[1]


def restore_by_tool(pair, adapter, *, directions, gives_embeddings_back=False):
    """The share of each layer's drift that `lorax-transfer` takes unless it is told one."""
    names, B, A = _lists(adapter)
    source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
    outside = None if gives_embeddings_back else moved_by(pair, [EMBEDDING])
    drifts = [float((t - s).norm() / s.norm()) for s, t in zip(source, target, strict=True)]
    shares = [restored_share(each, outside) for each in drifts]
    moved = lk.restore_lora(B, A, source, target, directions=directions, strength=shares)
    return _named(names, moved)


def undo(pair, adapter):
    """The whole drift of the adapted layers taken back: what restoring can reach at most."""
    out = {}
    for name, (B, A) in adapter.factors.items():
        D = pair.source.matrix(name) - pair.target.matrix(name)
        out[name] = (torch.cat([B, D], 1), torch.cat([A, torch.eye(D.shape[1], device=D.device)]))
    return out


def same_shape(kind, ranks=(64, 320)):
    """Name -> method, for models of one shape and a kind of adapter."""
    methods = {"copy": copy}
    if kind == "lorax":
        methods["lorax core"] = cores
    for rank in ranks:
        for method in ("lorax", "prolora", "transport"):
            methods[f"{method} k={rank}"] = partial(subspace, method=method, rank=rank)
    methods[f"index copy k={ranks[-1]}"] = partial(index_copy, rank=ranks[-1])
    for sides in ("input", "output", "both"):
        methods[f"anchor {sides}"] = partial(anchor, sides=sides)
    methods["restore q=16"] = partial(restore, directions=16)
    return methods


def sweeps():
    """Settings of the methods that have one, for choosing it."""
    methods = {f"copy x{s}": partial(copy, scale=s) for s in (0.7, 0.85, 1.2, 1.5)}
    for sides in ("input", "output", "both"):
        methods[f"anchor {sides} w=0.5"] = partial(anchor, sides=sides, strength=0.5)
    for q in (4, 64, 192):
        methods[f"restore q={q}"] = partial(restore, directions=q)
    methods["restore q=64 w=0.5"] = partial(restore, directions=64, strength=0.5)
    methods["undo all"] = undo
    return methods


def measured(kind, ranks):
    """Name -> method, as the measurement compares them."""
    last = ranks[-1]
    methods = {"copy": copy}
    if kind == "lorax":
        methods["lorax core"] = cores
        methods |= {"transport k=64": partial(subspace, method="transport", rank=64)}
        methods["anchor output"] = partial(anchor, sides="output")
    else:
        methods["copy x1.2"] = partial(copy, scale=1.2)
        for rank in ranks:
            for method in ("lorax", "prolora"):
                methods[f"{method} k={rank}"] = partial(subspace, method=method, rank=rank)
        methods["transport k=64"] = partial(subspace, method="transport", rank=64)
        methods[f"index copy k={last}"] = partial(index_copy, rank=last)
        methods["anchor output"] = partial(anchor, sides="output")
        methods["anchor both"] = partial(anchor, sides="both")
    methods["restore q=16"] = partial(restore, directions=16)
    methods["restore q=16 w=0.5"] = partial(restore, directions=16, strength=0.5)
    methods["restore q=16 by drift"] = partial(restore_by_drift, directions=16)
    if kind == "lora":
        methods["anchor + restore by drift"] = partial(anchor_and_restore, directions=16)
    for name, strength in (("", 1.0), (" w=0.5", 0.5)):
        methods[f"restore q=16{name} with embeddings"] = partial(
            beside,
            layers=partial(restore, directions=16, strength=strength),
            part=partial(leading, directions=16),
            strength=strength,
        )
    methods["undo all"] = undo
    methods["source's embeddings"] = partial(beside, layers=copy, part=whole)
    methods["undo all, source's embeddings"] = partial(beside, layers=undo, part=whole)
    return methods


def with_embeddings(kind):
    """Name -> method, for parts of the embeddings' drift beside what is done to the layers.

    "restore" is the tool's with its defaults, "restore --embeddings W" with that option.
    """
    few, sixteen, many = (partial(leading, directions=q) for q in (1, 16, 64))
    tool = partial(restore_by_tool, directions=16, gives_embeddings_back=True)
    by_drift = partial(restore_by_drift, directions=16)
    both = partial(anchor, sides="both")
    written, read = (partial(met, directions=16, is_written=w) for w in (True, False))
    methods = {"restore": partial(restore_by_tool, directions=16)}
    made = {
        "copy --embeddings 1": {"layers": copy, "part": sixteen},
        "copy --embeddings 0.5": {"layers": copy, "part": sixteen, "strength": 0.5},
        "copy + embeddings q=1": {"layers": copy, "part": few},
        "copy + embeddings q=64": {"layers": copy, "part": many},
        "copy + embeddings q=16 input": {"layers": copy, "part": sixteen, "sides": (INPUT,)},
        "copy + embeddings q=16 output": {"layers": copy, "part": sixteen, "sides": (OUTPUT,)},
        "copy + embeddings written q=16": {"layers": copy, "part": written},
        "copy + embeddings read q=16": {"layers": copy, "part": read},
        "copy + embeddings of 4096 tokens": {"layers": copy, "part": partial(rows, count=4096)},
        "copy + embeddings untaught": {"layers": copy, "part": partial(untaught, share=0.5)},
        "restore --embeddings 1": {"layers": tool, "part": sixteen},
        "restore --embeddings 0.5": {"layers": tool, "part": sixteen, "strength": 0.5},
        "restore by drift + embeddings q=16": {"layers": by_drift, "part": sixteen},
    }
    if kind == "lora":
        made["anchor --embeddings 1"] = {"layers": both, "part": sixteen}
        made["anchor --embeddings 0.5"] = {"layers": both, "part": sixteen, "strength": 0.5}
    return methods | {name: partial(beside, **options) for name, options in made.items()}


def few(kind, ranks):
    """The methods that the second task compares."""
    named = ("copy", "lorax core", "lorax", "prolora", "transport", "anchor", "restore q=16")
    every = measured(kind, ranks[-1:])
    return {
        n: m
        for n, m in every.items()
        if n.startswith(named) and "embeddings" not in n and n != "copy x1.2"
    }


def chosen(kind, ranks, patterns):
    """The methods whose names fit one of some patterns, such as `restore*`."""
    every = measured(kind, ranks) | with_embeddings(kind)
    return {n: m for n, m in every.items() if any(fnmatchcase(n, p) for p in patterns)}
