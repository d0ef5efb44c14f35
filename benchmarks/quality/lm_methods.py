# SPDX-License-Identifier: Apache-2.0
"""Ways to move an adapter's factors, all called the same: `move(pair, adapter) -> factors`."""

import warnings
from dataclasses import dataclass, field
from functools import partial

import torch

import lorax_kernels as lk


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


def anchor(pair, adapter, *, sides, strength=1.0):
    names, B, A = _lists(adapter)
    source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
    return _named(names, lk.anchor_lora(B, A, source, target, sides=sides, strength=strength))


def restore(pair, adapter, *, directions, strength=1.0):
    names, B, A = _lists(adapter)
    source, target = ([m.matrix(n) for n in names] for m in (pair.source, pair.target))
    moved = lk.restore_lora(B, A, source, target, directions=directions, strength=strength)
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


def match_depth(source, target):
    """For every target layer the source layer most like it, monotone: a list of indices.

    Likeness of two layers is the mean cosine of their weights; the path that maximises its sum is
    found by dynamic programming. Models of one width only.
    """
    parts = [n.split(".", 3)[3] for n in source.shape.module_names()[:7]]

    def rows(model):
        return torch.stack(
            [
                torch.cat(
                    [
                        torch.nn.functional.normalize(
                            model.matrix(f"model.layers.{i}.{p}").reshape(-1), dim=0
                        )
                        for p in parts
                    ]
                )
                for i in range(model.shape.layers)
            ]
        )

    like = (rows(target) @ rows(source).T / len(parts)).tolist()
    best = [list(like[0])]
    for j in range(1, len(like)):
        row, reach = [], float("-inf")
        for i, value in enumerate(like[j]):
            reach = max(reach, best[-1][i])
            row.append(value + reach)
        best.append(row)
    path, limit = [], len(like[0])
    for row in reversed(best):
        i = max(range(limit), key=lambda i: row[i])
        path.append(i)
        limit = i + 1
    return path[::-1]


def by_depth(pair, adapter, *, scale=1.0):
    """Copy each layer's update to the target layers that match it."""
    out = {}
    for j, i in enumerate(match_depth(pair.source, pair.target)):
        for name, (B, A) in adapter.factors.items():
            head = f"model.layers.{i}."
            if name.startswith(head):
                out[f"model.layers.{j}.{name.removeprefix(head)}"] = (scale * B, A)
    return out
