# SPDX-License-Identifier: Apache-2.0
"""Weights of checkpoints as the matrices `(out, in)` that an update is added to."""

import math
from collections.abc import Mapping

import torch

from .adapters import Adapter
from .checkpoints import Checkpoint
from .errors import CheckpointError, MatchError

# Numbers compared at a time, in float64.
_CHUNK = 1 << 20


def as_matrix(shape: tuple[int, ...], is_transposed: bool) -> tuple[int, int]:
    """Shape `(out, in)` of a stored weight seen as a matrix; kernels count as inputs."""
    if is_transposed:
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def read_matrix(
    checkpoint: Checkpoint, name: str, is_transposed: bool, device: torch.device
) -> torch.Tensor:
    """Read a weight as a matrix `(out, in)`.

    Args:
        checkpoint: where it is.
        name: its tensor.
        is_transposed: it is stored `(in, out)`.
        device: where to put it.

    Raises:
        CheckpointError: it cannot be read, or holds NaN or Inf.
    """
    weight = checkpoint.read(name)
    if not bool(torch.isfinite(weight).all()):
        raise CheckpointError(
            f"{name} in {checkpoint.location} holds NaN or Inf, expected finite weights; the "
            "file is damaged or its training diverged, so get another copy."
        )
    weight = weight.flatten(1)
    return (weight.T.contiguous() if is_transposed else weight).to(device)


def transposed_modules(
    adapter: Adapter, source: Checkpoint, tensors: Mapping[str, str]
) -> dict[str, bool]:
    """For each module, whether its weight is stored `(in, out)`.

    A shape decides where its sides differ. A square weight follows the modules that share its last
    name (GPT-2's `c_proj` is square in one place only), and the adapter's flag where none does:
    PEFT keeps one flag for all, wrong for some modules of a model that mixes both layouts.
    """
    known: dict[str, bool] = {}
    by_leaf: dict[str, set[bool]] = {}
    for module, name in tensors.items():
        layer, shape = adapter.layers[module], source.shape(name)
        straight = (layer.out_features, layer.in_features, *layer.kernel_size)
        turned = None if layer.is_conv or layer.is_embedding else straight[1::-1]
        if shape not in (straight, turned):
            raise MatchError(
                f"{name} in the source {source.location} has shape {shape}, expected {straight} by "
                f"the adapter's factors for {module}; the adapter was trained on another model, so "
                "name that one as the source."
            )
        if straight != turned:
            known[module] = shape == turned
            by_leaf.setdefault(module.rpartition(".")[2], set()).add(known[module])
    for module in tensors:
        seen = by_leaf.get(module.rpartition(".")[2], set())
        known.setdefault(module, seen == {True} if len(seen) == 1 else adapter.fan_in_fan_out)
    return known


def relative_drift(source: torch.Tensor, target: torch.Tensor) -> float | None:
    """How far a matrix moved.

    Args:
        source: `W_s`.
        target: `W_t`.

    Returns:
        `||W_t - W_s|| / ||W_s||`; None where shapes differ or the source is zero.
    """
    if source.shape != target.shape:
        return None
    if source.dtype == target.dtype and torch.equal(source, target):
        return 0.0
    moved, size = energies(source, target)
    return math.sqrt(moved / size) if size else None


def energies(source: torch.Tensor, target: torch.Tensor) -> tuple[float, float]:
    """`||W_t - W_s||^2` and `||W_s||^2` of two tensors of one shape, in float64."""
    moved = size = source.new_zeros((), dtype=torch.float64)
    # A part at a time: a whole difference would be another weight in memory, and wider.
    for before, after in zip(
        source.flatten().split(_CHUNK), target.flatten().split(_CHUNK), strict=True
    ):
        before = before.double()
        moved = moved + (after.double() - before).square().sum()
        size = size + before.square().sum()
    return float(moved), float(size)
