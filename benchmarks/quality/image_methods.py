# SPDX-License-Identifier: Apache-2.0
"""Every way in which a style adapter of the source becomes one of a target."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

import lorax_kernels as lk
from benchmarks.quality.image_adapters import Adapter, Checkpoint, Factors, wait


@dataclass(frozen=True)
class Move:
    """What a transfer method is given: two checkpoints and the source's adapter."""

    source: Checkpoint
    target: Checkpoint
    adapter: Adapter

    def lists(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`B` and `A` of every layer, in one order."""
        pairs = self.adapter.factors.values()
        return [B for B, _ in pairs], [A for _, A in pairs]


def _published(method: str, share: float) -> Callable[[Move], Factors]:
    """A method of `transfer_lora` on the leading `share` of the directions of every layer."""

    def cut(out: int, inputs: int) -> int:
        return max(1, round(share * min(out, inputs)))

    def run(move: Move) -> Factors:
        B, A = move.lists()
        target, source = move.target.cut(cut), move.source.cut(cut)
        B, A = lk.transfer_lora(B, A, target, source, method)
        return dict(zip(move.adapter.factors, zip(B, A, strict=True), strict=True))

    return run


def _core(move: Move) -> Factors:
    """LoRA-X's own transfer, `C_t = (U_t^T U_s) C (V_s^T V_t)` on the target's bases."""
    assert move.adapter.cores is not None, "an ordinary LoRA has no cores"
    factors = {}
    target, source = move.target.full_bases(), move.source.full_bases()
    for name, C in move.adapter.cores.items():
        base = target[name].truncate(len(C))
        moved = lk.transfer_core(C, source[name].truncate(len(C)), base)
        factors[name] = (base.U @ moved, base.V.mT)
    return factors


def _anchored(sides: str, strength: float) -> Callable[[Move], Factors]:
    """Copy, with the drift that the adapter meets undone on its inputs, outputs or both."""

    def run(move: Move) -> Factors:
        B, A = move.lists()
        names = list(move.adapter.factors)
        source, target = move.source.matrices, move.target.matrices
        pair = [source[n] for n in names], [target[n] for n in names]
        B, A = lk.anchor_lora(B, A, *pair, sides=sides, strength=strength)
        return dict(zip(names, zip(B, A, strict=True), strict=True))

    return run


def _restored(directions: int, strength: float) -> Callable[[Move], Factors]:
    """Copy, with the largest directions of the target's own training taken back."""

    def run(move: Move) -> Factors:
        B, A = move.lists()
        names = list(move.adapter.factors)
        source, target = move.source.matrices, move.target.matrices
        pair = [source[n] for n in names], [target[n] for n in names]
        B, A = lk.restore_lora(B, A, *pair, directions=directions, strength=strength)
        return dict(zip(names, zip(B, A, strict=True), strict=True))

    return run


def _undone(move: Move) -> Factors:
    """The source's layers with the adapter: all of the drift of the adapted layers taken back."""
    factors = {}
    for name, (B, A) in move.adapter.factors.items():
        D = move.source.matrices[name] - move.target.matrices[name]
        eye = torch.eye(D.shape[1], dtype=D.dtype, device=D.device)
        factors[name] = (torch.cat([B, D], 1), torch.cat([A, eye]))
    return factors


def methods(kind: str) -> dict[str, Callable[[Move], Factors]]:
    """Transfer methods by name, for one kind of adapter; a fraction is the share of directions."""
    shared: dict[str, Callable[[Move], Factors]] = {
        "copy": lambda move: move.adapter.factors,
        "lorax 1/2": _published("lorax", 1 / 2),
        "prolora 1/2": _published("prolora", 1 / 2),
        "transport 1/4": _published("transport", 1 / 4),
        "transport 1/2": _published("transport", 1 / 2),
        "anchor input": _anchored("input", 1.0),
        "anchor output": _anchored("output", 1.0),
        "anchor both": _anchored("both", 1.0),
        "restore 16": _restored(16, 1.0),
        "restore 16, half": _restored(16, 0.5),
        "undo all (control)": _undone,
    }
    if kind == "lorax":
        return shared | {"lorax core": _core}
    return shared | {"lorax 1/4": _published("lorax", 1 / 4)}


def transfer(move: Move, method: Callable[[Move], Factors]) -> tuple[Factors, float]:
    """The adapter's factors on the target and the milliseconds it took, bases at hand."""
    any_weight = next(iter(move.target.weights.values()))
    wait(any_weight)
    start = time.perf_counter()
    factors = method(move)
    wait(any_weight)
    return factors, 1000 * (time.perf_counter() - start)
