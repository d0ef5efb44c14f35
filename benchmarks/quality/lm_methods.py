# SPDX-License-Identifier: Apache-2.0
"""Ways to move an adapter's factors, all called the same: `move(pair, adapter) -> factors`."""

import warnings
from dataclasses import dataclass, field
from functools import partial

import torch

import lorax_kernels as lk
from lorax_transfer.settings import restored_share

from .lm_embeddings import INPUT, OUTPUT, beside, leading, met, rows, untaught, whole
from .lm_model import EMBEDDING
from .lm_scan import moved_by
from .lm_train import clock

# Directions that the tool takes back.
DIRECTIONS = 16


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


@dataclass
class Pair:
    """Where an adapter comes from and where it goes.

    Several methods rest on the same costly part. It is found once, and `saved` counts the seconds
    that this spares, so that each can still be told what it would have taken alone.
    """

    source: Model
    target: Model
    saved: float = 0.0
    _found: dict = field(default_factory=dict)

    def once(self, key, find):
        """What `find()` gives, found at the first call of this key."""
        if key in self._found:
            value, seconds = self._found[key]
            self.saved += seconds
            return value
        started = clock()
        value = find()
        self._found[key] = value, clock() - started
        return value


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


def anchor(pair, adapter, *, sides, strength=1.0):
    def find():
        names, B, A = _lists(adapter)
        source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
        moved = lk.anchor_lora(B, A, source, target, sides=sides, strength=strength)
        return adapter, _named(names, moved)  # with the adapter, so that its id stays its own

    return pair.once(("anchor", sides, strength, id(adapter)), find)[1]


def _leading(pair, names, directions):
    """Factors that take the leading directions of every layer's drift back."""

    def find():
        source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
        B = [W.new_zeros(len(W), 1) for W in source]
        A = [W.new_zeros(1, W.shape[1]) for W in source]
        moved = lk.restore_lora(B, A, source, target, directions=directions)
        return {n: (b[:, 1:], a[1:]) for n, (b, a) in _named(names, moved).items()}

    return pair.once(("leading", directions, *names), find)


def restore(pair, adapter, *, directions=DIRECTIONS, strength=None, gives_embeddings_back=False):
    """`lk.restore_lora`, which is one search for directions whatever the adapter.

    Without a strength it takes the share of each layer's drift that `lorax-transfer` does.
    """
    names = tuple(adapter.factors)
    shares = dict.fromkeys(names, strength)
    if strength is None:
        outside = pair.source.weights.keys() - {f"{n}.weight" for n in names}
        left = [moved_by(pair, outside - {EMBEDDING})]
        if not gives_embeddings_back:
            left.append(moved_by(pair, [EMBEDDING]))
        for name in names:
            W_s, W_t = pair.source.matrix(name), pair.target.matrix(name)
            shares[name] = restored_share(float((W_t - W_s).norm() / W_s.norm()), max(left))
    moved = {}
    for name, (undo_B, undo_A) in _leading(pair, names, directions).items():
        B, A = adapter.factors[name]
        moved[name] = torch.cat([B, shares[name] * undo_B], 1), torch.cat([A, undo_A])
    return moved


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
    methods["restore --strength 1"] = partial(restore, strength=1.0)
    return methods


def sweeps():
    """Settings of the methods that have one, for choosing it."""
    methods = {f"copy x{s}": partial(copy, scale=s) for s in (0.7, 0.85, 1.2, 1.5)}
    for sides in ("input", "output", "both"):
        methods[f"anchor {sides} w=0.5"] = partial(anchor, sides=sides, strength=0.5)
    for q in (4, 64, 192):
        methods[f"restore q={q}"] = partial(restore, directions=q, strength=1.0)
    methods["restore q=64 w=0.5"] = partial(restore, directions=64, strength=0.5)
    methods["undo all"] = undo
    return methods


def measured(kind, ranks, has_embeddings=True):
    """Name -> method, as the measurement compares them.

    A name like a command is that command of `lorax-transfer`, with its defaults. `has_embeddings`
    says whether those have a drift that can be taken back.
    """
    last, first = ranks[-1], ranks[0]
    sides = "output" if kind == "lorax" else "both"
    layers = partial(anchor, sides=sides)
    methods = {"copy": copy, f"anchor {sides}": layers, "restore": restore}
    methods["restore --strength 1"] = partial(restore, strength=1.0)
    if has_embeddings:
        tool = partial(restore, gives_embeddings_back=True)
        sixteen = partial(leading, directions=DIRECTIONS)
        for share in (0.5, 1.0):
            for name, on_layers in (("copy", copy), ("restore", tool)):
                methods[f"{name} --embeddings {share:g}"] = partial(
                    beside, layers=on_layers, part=sixteen, strength=share
                )
        full = methods["restore --strength 1"]
        methods["restore --strength 1 --embeddings 1"] = partial(beside, layers=full, part=sixteen)
        if kind != "lorax":
            methods["anchor --embeddings 1"] = partial(beside, layers=layers, part=sixteen)
    if kind == "lorax":
        methods["lorax core"] = cores
    else:
        methods[f"lorax k={last}"] = partial(subspace, method="lorax", rank=last)
        methods[f"prolora k={first}"] = partial(subspace, method="prolora", rank=first)
    methods[f"transport k={first}"] = partial(subspace, method="transport", rank=first)
    return methods


def controls():
    """Name -> other parts of the embeddings' drift, or all of it: no methods to choose."""
    few, sixteen, many = (partial(leading, directions=q) for q in (1, DIRECTIONS, 64))
    written, read = (partial(met, directions=DIRECTIONS, is_written=w) for w in (True, False))
    made = {
        "undo all, source's embeddings": {"layers": undo, "part": whole},
        "source's embeddings": {"part": whole},
        "copy + embeddings q=1": {"part": few},
        "copy + embeddings q=64": {"part": many},
        "copy + embeddings q=16 input": {"part": sixteen, "sides": (INPUT,)},
        "copy + embeddings q=16 output": {"part": sixteen, "sides": (OUTPUT,)},
        "copy + embeddings written q=16": {"part": written},
        "copy + embeddings read q=16": {"part": read},
        "copy + embeddings of 4096 tokens": {"part": partial(rows, count=4096)},
        "copy + embeddings untaught": {"part": partial(untaught, share=0.5)},
    }
    return {name: partial(beside, **({"layers": copy} | options)) for name, options in made.items()}
