# SPDX-License-Identifier: Apache-2.0
"""Style adapters on the U-Net: how they are trained, and how they are moved to another checkpoint.

Both kinds act as they do in PEFT, `W + B A` and `W + U C V^T`, with a kernel as an `(out, inputs)`
matrix. They are added to the weights before a step, which costs less than more layers would.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import save_file

import lorax_kernels as lk
from benchmarks.quality.image_model import Weights, matrices

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass
class Checkpoint:
    """A base model, with the bases of its adapted layers decomposed once for each cut.

    Attributes:
        name: what it is called in the results.
        weights: all weights, float32.
        layers: the adapted layers and the shapes of their weights.
    """

    name: str
    weights: dict[str, torch.Tensor]
    layers: dict[str, tuple[int, ...]]
    bases: dict[str, dict[str, lk.SVD]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @cached_property
    def matrices(self) -> dict[str, torch.Tensor]:
        """Weights of the adapted layers as matrices."""
        return matrices(self.weights, self.layers)

    def full_bases(self) -> dict[str, lk.SVD]:
        """Every singular triplet of every adapted layer."""
        if "full" not in self.bases:
            start = time.perf_counter()
            kept = self.matrices
            svds = {}
            for W in {tuple(W.shape) for W in kept.values()}:
                names = [name for name, value in kept.items() if tuple(value.shape) == W]
                stack = torch.stack([kept[name] for name in names])
                svds.update(zip(names, lk.truncated_svd(stack, rank=min(W)).unbind(), strict=True))
            self.bases["full"] = {name: svds[name] for name in self.layers}
            wait(next(iter(kept.values())))
            self.seconds["full"] = time.perf_counter() - start
        return self.bases["full"]

    def cut(self, ranks: Callable[[int, int], int]) -> list[lk.SVD]:
        """Leading triplets of every adapted layer, as many as `ranks(out, inputs)`."""
        return [
            svd.truncate(ranks(svd.U.shape[0], svd.V.shape[0]))
            for svd in self.full_bases().values()
        ]


def wait(tensor: torch.Tensor) -> None:
    """Let queued work end, before a clock is read."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Adapter:
    """A trained adapter.

    Attributes:
        kind: "lora" or "lorax".
        factors: `B` `(out, r)` and `A` `(r, inputs)` of every layer; scale 1.
        cores: of LoRA-X, `C` `(k, k)`; the factors are then `U C` and `V^T`.
    """

    kind: str
    factors: Factors
    cores: dict[str, torch.Tensor] | None = None

    def merged(self, weights: Weights, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The weights with the adapter in them."""
        return merge(weights, self.factors, dtype)


def merge(weights: Weights, factors: Factors, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """`W + B A` for the layers in `factors`, everything in `dtype`."""
    merged = {}
    for name, value in weights.items():
        pair = factors.get(name.removesuffix(".weight"))
        if pair is not None and name.endswith(".weight"):
            value = value + (pair[0] @ pair[1]).view(value.shape)  # in the layout of the weight
        merged[name] = value.to(dtype)
    return merged


def core_rank(out: int, inputs: int, rank: int) -> int:
    """Width of the core with as many numbers as an ordinary LoRA of this rank."""
    return min(out, inputs, round(math.sqrt(rank * (out + inputs))))


def lora_parameters(
    layers: Mapping[str, tuple[int, ...]], rank: int, seed: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """`A` drawn as PEFT draws it, `B` zero."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {}
    for name, shape in layers.items():
        out, inputs = shape[0], math.prod(shape[1:])
        A = torch.empty(rank, inputs)
        torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
        parameters[f"{name}.lora_A"] = A.to(device)
        parameters[f"{name}.lora_B"] = torch.zeros(out, rank, device=device)
    return parameters


def lora_factors(parameters: Weights, layers: Mapping[str, tuple[int, ...]]) -> Factors:
    """`B`, `A` of every layer."""
    return {n: (parameters[f"{n}.lora_B"], parameters[f"{n}.lora_A"]) for n in layers}


def lorax_parameters(base: Checkpoint, rank: int) -> dict[str, torch.Tensor]:
    """A zero core for every layer."""
    return {
        name: torch.zeros(svd.rank, svd.rank, device=svd.U.device)
        for name, svd in zip(base.layers, lorax_bases(base, rank), strict=True)
    }


def lorax_bases(base: Checkpoint, rank: int) -> list[lk.SVD]:
    """The bases of a LoRA-X adapter of the trained size of an ordinary one of this rank."""
    return base.cut(lambda out, inputs: core_rank(out, inputs, rank))


def lorax_factors(cores: Weights, bases: Mapping[str, lk.SVD]) -> Factors:
    """`U C` and `V^T` of every layer."""
    return {name: (svd.U @ cores[name], svd.V.mT) for name, svd in bases.items()}


def realiser(
    base: Weights,
    layers: Mapping[str, tuple[int, ...]],
    factors: Callable[[Weights], Factors],
    dtype: torch.dtype,
) -> Callable[[Weights], dict[str, torch.Tensor]]:
    """Weights of the computation from an adapter's parameters; what is frozen is cast once."""
    adapted = {f"{name}.weight" for name in layers}
    frozen = {name: value.to(dtype) for name, value in base.items() if name not in adapted}
    moved = {name: base[name] for name in adapted}
    return lambda parameters: frozen | merge(moved, factors(parameters), dtype)


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


def _restored(directions: int) -> Callable[[Move], Factors]:
    """Copy, with the largest directions of the target's own training taken back."""

    def run(move: Move) -> Factors:
        B, A = move.lists()
        names = list(move.adapter.factors)
        source, target = move.source.matrices, move.target.matrices
        pair = [source[n] for n in names], [target[n] for n in names]
        B, A = lk.restore_lora(B, A, *pair, directions=directions)
        return dict(zip(names, zip(B, A, strict=True), strict=True))

    return run


def methods(kind: str) -> dict[str, Callable[[Move], Factors]]:
    """Transfer methods by name, for one kind of adapter; a number is the share of directions."""
    shared: dict[str, Callable[[Move], Factors]] = {
        "copy": lambda move: move.adapter.factors,
        "anchor input": _anchored("input", 1.0),
        "anchor output": _anchored("output", 1.0),
    }
    if kind == "lorax":
        return shared | {
            "lorax": _core,
            "prolora 1/2": _published("prolora", 1 / 2),
            "transport 1/2": _published("transport", 1 / 2),
        }
    return shared | {
        "lorax 1/4": _published("lorax", 1 / 4),
        "lorax 1/2": _published("lorax", 1 / 2),
        "prolora 1/4": _published("prolora", 1 / 4),
        "prolora 1/2": _published("prolora", 1 / 2),
        "transport 1/4": _published("transport", 1 / 4),
        "transport 1/2": _published("transport", 1 / 2),
        "anchor input, half": _anchored("input", 0.5),
        "anchor both": _anchored("both", 1.0),
        "anchor both, half": _anchored("both", 0.5),
        "restore 16": _restored(16),
    }


def transfer(move: Move, method: Callable[[Move], Factors]) -> tuple[Factors, float]:
    """The adapter's factors on the target and the milliseconds it took, bases at hand."""
    any_weight = next(iter(move.target.weights.values()))
    wait(any_weight)
    start = time.perf_counter()
    factors = method(move)
    wait(any_weight)
    return factors, 1000 * (time.perf_counter() - start)


def save_peft(
    folder: Path, factors: Factors, layers: Mapping[str, tuple[int, ...]], base: str
) -> None:
    """Write factors of one rank as an ordinary LoRA that PEFT loads."""
    from peft import LoraConfig

    rank = next(iter(factors.values()))[0].shape[1]
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(factors))
    config.base_model_name_or_path = base
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (B, A) in factors.items():
        kernel = layers[name][2:]
        shape_A = (rank, layers[name][1], *kernel)
        shape_B = (*B.shape, *(1 for _ in kernel))
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.reshape(shape_A).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.reshape(shape_B).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
