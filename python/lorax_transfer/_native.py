# SPDX-License-Identifier: Apache-2.0
"""Between a LoRA-X adapter's cores and the factors that everything else works with.

Cores say nothing without the bases of their base model. `expand` derives those and multiplies out;
`contract` goes the other way, for an update that lies in the bases at hand.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

import lorax_kernels as lk

from .adapters import Adapter, LoraLayer
from .adapters.lorax import NativeAdapter, NativeLayer
from .adapters.lorax_form import align, check_basis, digest, matching, probe, signs
from .bases import BasisMaker
from .checkpoints import Checkpoint
from .errors import MatchError
from .matching import match
from .plan import BATCH_BYTES, Plan, as_matrix

# Part of an update's norm that may lie outside of the bases for its core to stand for it: they are
# known to about 1e-5.
_MAX_OUTSIDE = 1e-3


def outline(native: NativeAdapter, source: Checkpoint) -> Adapter:
    """The adapter with factors of the right shapes and no content, for a plan.

    Args:
        native: the adapter.
        source: the base model that it was trained on.

    Returns:
        The adapter; its factors are zeros that take no memory.
    """
    tensors = match(list(native.layers), source, "source").tensors
    layers = []
    for module, name in tensors.items():
        shape, rank = source.shape(name), native.layers[module].rank
        turned = _is_turned(native, shape)
        m, n = as_matrix(shape, turned)
        B, A = torch.zeros(()).expand(m, rank), torch.zeros(()).expand(rank, n)
        layers.append(lora_layer(module, B, A, shape))
    return _adapter(native, layers, bool(native.config.get("fan_in_fan_out")))


def expand(
    native: NativeAdapter,
    source: Checkpoint,
    bases: BasisMaker,
    device: torch.device,
    step: Callable[[int], None] = lambda count: None,
) -> Adapter:
    """The adapter as an ordinary LoRA of the same rank and the same update.

    Args:
        native: the adapter.
        source: the base model that it was trained on.
        bases: what makes exact bases.
        device: where to compute.
        step: called with the number of layers done since the last call.

    Returns:
        The adapter, its factors in float32 on the CPU: `B = scale * U C`, `A = V^T`.

    Raises:
        MatchError: the model is not the one that the adapter was trained on.
        AdapterError: its singular vectors cannot be found again.
    """
    tensors = match(list(native.layers), source, "source").tensors
    layers, is_turned = [], False
    for batch in _batches(tensors, source):
        weights = [_trained_on(native.layers[x], source, tensors[x]) for x in batch]
        turned = [_is_turned(native, tuple(weight.shape)) for weight in weights]
        matrices = [_matrix(w, t).to(device) for w, t in zip(weights, turned, strict=True)]
        ranks = [native.layers[module].rank for module in batch]
        for i, made in enumerate(bases.make(matrices, ranks)):
            layer, svd = native.layers[batch[i]], check_basis(made.svd, batch[i])
            if _is_other_way(layer, weights[i], svd):
                svd, turned[i] = replace(svd, U=svd.V, V=svd.U), not turned[i]
            is_turned |= turned[i]
            form = native.config["core"]
            found = probe(svd.U).cpu()
            core = align(layer.weight, form, layer.probe, found)
            applied = native.applied_core(core).to(device)
            B, A = (svd.U @ applied).cpu(), svd.V.mT.cpu().contiguous()
            layers.append(lora_layer(batch[i], B, A, tuple(weights[i].shape)))
        step(len(batch))
    by_module = {layer.module: layer for layer in layers}
    return _adapter(native, [by_module[module] for module in native.layers], is_turned)


def contract(
    native: NativeAdapter,
    moved: dict[str, tuple[LoraLayer, lk.SVD]],
    plan: Plan,
    target: Checkpoint,
) -> NativeAdapter | str:
    """A moved update as cores between the target's bases.

    Args:
        native: the adapter that was moved.
        moved: for each module its update and the basis of the target's weight.
        plan: how it was moved.
        target: the base model that it was moved to.

    Returns:
        The adapter for the target, or the module whose update lies outside of the bases.

    Raises:
        AdapterError: singular vectors of the target are not determined.
    """
    names = {planned.module: planned.target_tensor for planned in plan.layers}
    layers, convolutions = {}, {}
    known = native.config.get("convolutions", {})
    for module, (layer, svd) in moved.items():
        svd = check_basis(svd, module)
        B, A = layer.matrix_B.double(), layer.matrix_A.double()
        core = (svd.U.mT.cpu().double() @ B) @ (A @ svd.V.cpu().double()) * layer.scale
        whole = lk.update_norm(B, A) * abs(layer.scale)
        outside = math.sqrt(max(0.0, whole**2 - float(core.square().sum())))
        if outside > _MAX_OUTSIDE * whole:
            return module
        weight = target.read(names[module])
        # Its path in the target, which differs where models of another depth are aligned.
        path = layer.module
        layers[path] = NativeLayer(path, core.float(), probe(svd.U).cpu(), digest(weight))
        if module in known:
            convolutions[path] = known[module]
    config = {
        **native.config,
        "core": "full",
        "bandwidth": 0,
        "energy": None,
        "r": max(layer.rank for layer in layers.values()),
        "scale": 1.0,
        "target_modules": list(layers),
    }
    if known:
        config["convolutions"] = convolutions
    return NativeAdapter(layers, config, native.metadata, native.location, native.content_hash)


def _trained_on(layer: NativeLayer, source: Checkpoint, name: str) -> torch.Tensor:
    weight = matching(source.read(name), layer.digest)
    if weight is None:
        raise MatchError(
            f"{name} in {source.location} is not the weight that the core of {layer.module} was "
            "trained on; name the base model of the training run as the source."
        )
    return weight


def _batches(tensors: dict[str, str], source: Checkpoint) -> Iterator[list[str]]:
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for module, name in tensors.items():
        by_shape.setdefault(source.shape(name), []).append(module)
    for shape, modules in by_shape.items():
        count = max(1, BATCH_BYTES // (8 * math.prod(shape)))
        for start in range(0, len(modules), count):
            yield modules[start : start + count]


def _matrix(weight: torch.Tensor, is_turned: bool) -> torch.Tensor:
    return weight.T.contiguous() if is_turned else weight.flatten(1)


def _is_turned(native: NativeAdapter, shape: tuple[int, ...]) -> bool:
    """Whether a weight is stored `(in, out)`, as far as the configuration knows."""
    return len(shape) == 2 and bool(native.config.get("fan_in_fan_out"))


def _is_other_way(layer: NativeLayer, weight: torch.Tensor, svd: lk.SVD) -> bool:
    """Whether the basis is that of the transposed weight: models may mix both layouts."""
    if weight.dim() != 2 or svd.rank != layer.rank:
        return False
    as_guessed, turned = (signs(layer.probe, probe(x).cpu())[1] for x in (svd.U, svd.V))
    return turned < as_guessed


def lora_layer(module: str, B: torch.Tensor, A: torch.Tensor, shape: tuple[int, ...]) -> LoraLayer:
    """A layer of these factors, for a weight of that shape: matrices, or those of a convolution."""
    kernel = shape[2:]
    if kernel:
        A = A.reshape(len(A), -1, *kernel)
        B = B.reshape(*B.shape, *(1 for _ in kernel))
    return LoraLayer(module, A, B, 1.0)


def lora_config(config: Mapping[str, Any], layers: Sequence[LoraLayer]) -> dict[str, Any]:
    """The configuration of an ordinary LoRA that stands for a LoRA-X adapter.

    Args:
        config: that of the LoRA-X adapter.
        layers: its layers with factors; ranks and scales are settled when it is written.
    """
    kept = ("base_model_name_or_path", "task_type", "auto_mapping", "revision")
    rank = max(layer.rank for layer in layers)
    return {
        **{key: config.get(key) for key in kept},
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "bias": "none",
        "init_lora_weights": True,
        "target_modules": [layer.module for layer in layers],
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
    }


def _adapter(native: NativeAdapter, layers: list[LoraLayer], is_turned: bool) -> Adapter:
    return Adapter(
        layers={layer.module: layer for layer in layers},
        config={**lora_config(native.config, layers), "fan_in_fan_out": is_turned},
        metadata=native.metadata,
        location=native.location,
        dropped=(),
        content_hash=native.content_hash,
        targets=tuple(native.layers),
        is_lorax=True,
    )
