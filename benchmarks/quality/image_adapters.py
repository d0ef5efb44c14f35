# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and style adapters of the text-to-image model, and how the adapters are trained.

Both kinds act as they do in PEFT, `W + B A` and `W + U C V^T`, with a kernel as an `(out, inputs)`
matrix. In training they are added to the weights before a step, all layers of one shape in one
product: that takes fewer kernels than layers of their own would.
"""

from __future__ import annotations

import math
import re
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
            svds: dict[str, lk.SVD] = {}
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
            value = value + (pair[0] @ pair[1]).view(value.shape)
        merged[name] = value.to(dtype)
    return merged


def core_rank(layers: Mapping[str, tuple[int, ...]], rank: int) -> int:
    """Width of full cores, capped at a layer's shorter side, that train as much as a LoRA does."""
    sides = [(shape[0], math.prod(shape[1:])) for shape in layers.values()]
    trained = sum(rank * (out + inputs) for out, inputs in sides)
    width = 1
    while width < max(map(min, sides)):
        if sum(min(width + 1, *side) ** 2 for side in sides) > trained:
            break
        width += 1
    return width


class Trainable:
    """An adapter in training: its parameters, and the weights that they make of the base's.

    Args:
        kind: "lora", `A` drawn as PEFT draws it and `B` zero; or "lorax", full cores of zeros.
        base: what it is trained on.
        rank: of the ordinary LoRA; LoRA-X gets the cores that train as much.
        seed: of `A`.
        dtype: of the computation.
    """

    def __init__(
        self, kind: str, base: Checkpoint, rank: int, seed: int, dtype: torch.dtype
    ) -> None:
        self.kind, self.dtype = kind, dtype
        self.shapes = base.layers
        # Layers of one shape are one stack.
        self.groups = [
            [name for name in base.layers if base.layers[name] == shape]
            for shape in dict.fromkeys(base.layers.values())
        ]
        adapted = {f"{name}.weight" for name in base.layers}
        # What is frozen is cast once.
        self.frozen = {k: v.to(dtype) for k, v in base.weights.items() if k not in adapted}
        self.stacks = [torch.stack([base.matrices[n] for n in names]) for names in self.groups]
        generator = torch.Generator().manual_seed(seed)
        self.parameters: dict[str, torch.Tensor] = {}
        self.bases: list[tuple[torch.Tensor, torch.Tensor]] = []
        if kind == "lorax":
            svds = dict(zip(base.layers, lorax_bases(base, rank), strict=True))
        for i, (names, W) in enumerate(zip(self.groups, self.stacks, strict=True)):
            count, out, inputs = W.shape
            if kind == "lora":
                A = torch.empty(count, rank, inputs)
                A.uniform_(-1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=generator)
                self.parameters[f"{i}.A"] = A.to(W.device)
                self.parameters[f"{i}.B"] = W.new_zeros(count, out, rank)
            else:
                U = torch.stack([svds[name].U for name in names])
                V = torch.stack([svds[name].V for name in names])
                self.bases.append((U, V.mT.contiguous()))
                self.parameters[f"{i}.C"] = W.new_zeros(count, U.shape[2], U.shape[2])

    def factors(self, parameters: Weights) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`B` and `A` of every stack."""
        if self.kind == "lora":
            return [(parameters[f"{i}.B"], parameters[f"{i}.A"]) for i in range(len(self.groups))]
        return [(U @ parameters[f"{i}.C"], Vh) for i, (U, Vh) in enumerate(self.bases)]

    def weights(self, parameters: Weights) -> dict[str, torch.Tensor]:
        """All weights of the adapted model."""
        weights = dict(self.frozen)
        pairs = self.factors(parameters)
        for names, W, (B, A) in zip(self.groups, self.stacks, pairs, strict=True):
            moved = torch.baddbmm(W, B, A).to(self.dtype)
            for name, matrix in zip(names, moved.unbind(), strict=True):
                weights[f"{name}.weight"] = matrix.view(self.shapes[name])
        return weights

    def adapter(self, parameters: Weights) -> Adapter:
        """The adapter that these parameters are."""
        factors, cores = {}, {}
        pairs = self.factors(parameters)
        for i, (names, (B, A)) in enumerate(zip(self.groups, pairs, strict=True)):
            for j, name in enumerate(names):
                factors[name] = (B[j], A[j])
                if self.kind == "lorax":
                    cores[name] = parameters[f"{i}.C"][j]
        factors = {name: factors[name] for name in self.shapes}
        return Adapter(self.kind, factors, cores or None)


def lorax_bases(base: Checkpoint, rank: int) -> list[lk.SVD]:
    """The bases of a LoRA-X adapter of the trained size of an ordinary one of this rank."""
    width = core_rank(base.layers, rank)
    return base.cut(lambda out, inputs: min(width, out, inputs))


def lorax_factors(cores: Weights, bases: Mapping[str, lk.SVD]) -> Factors:
    """`U C` and `V^T` of every layer."""
    return {name: (svd.U @ cores[name], svd.V.mT) for name, svd in bases.items()}


def stored(adapter: Adapter, name: str) -> dict[str, torch.Tensor]:
    """What has to be kept of an adapter, by names under this one: factors, or cores alone."""
    tensors: dict[str, torch.Tensor] = {}
    for layer, (B, A) in adapter.factors.items():
        if adapter.cores is None:
            tensors |= {f"{name}.{layer}.B": B, f"{name}.{layer}.A": A}
        else:
            tensors[f"{name}.{layer}.C"] = adapter.cores[layer]
    return {key: value.contiguous() for key, value in tensors.items()}


def restored(tensors: Weights, name: str, base: Checkpoint, rank: int) -> Adapter:
    """The adapter that was stored under a name, on its base; `rank` is that of the LoRA."""
    if f"{name}.{next(iter(base.layers))}.C" not in tensors:
        factors = {
            layer: (tensors[f"{name}.{layer}.B"], tensors[f"{name}.{layer}.A"])
            for layer in base.layers
        }
        return Adapter("lora", factors)
    cores = {layer: tensors[f"{name}.{layer}.C"] for layer in base.layers}
    bases = dict(zip(base.layers, lorax_bases(base, rank), strict=True))
    return Adapter("lorax", lorax_factors(cores, bases), cores)


def save_peft(
    folder: Path, factors: Factors, layers: Mapping[str, tuple[int, ...]], base: str
) -> None:
    """Write an adapter as an ordinary LoRA that PEFT loads."""
    from peft import LoraConfig

    ranks = {name: B.shape[1] for name, (B, _) in factors.items()}
    most = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(r=most, lora_alpha=most, target_modules=list(factors))
    # By whole path, as PEFT's patterns are regular expressions that match the end of one.
    config.rank_pattern = config.alpha_pattern = {f"^{re.escape(n)}$": r for n, r in other.items()}
    config.base_model_name_or_path = base
    config.inference_mode = True
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    tensors = {}
    for name, (B, A) in factors.items():
        kernel = layers[name][2:]
        shape_A = (ranks[name], layers[name][1], *kernel)
        shape_B = (*B.shape, *(1 for _ in kernel))
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.reshape(shape_A).contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.reshape(shape_B).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
