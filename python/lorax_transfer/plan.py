# SPDX-License-Identifier: Apache-2.0
"""What will be done to each layer and why, decided from names and shapes alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from .adapters import Adapter, LoraLayer
from .checkpoints import Checkpoint
from .errors import CheckpointError, MatchError, TransferError
from .matching import match
from .settings import DEFAULT_RANK, Settings

# Weights in memory at a time, both models together, unless a single layer needs more. With 256 MiB
# a model of 1.1 B parameters peaks some 300 MB higher (benchmarks/transfer/memory.py).
BATCH_BYTES = 128 << 20

_WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class LayerPlan:
    """What will be done to one module.

    Attributes:
        module: its path in the adapter.
        lora_rank: rank of its update.
        source_tensor: its weight in the source.
        target_tensor: its weight in the target.
        source_shape: the source's weight as a matrix `(out, in)`; kernels count as inputs.
        target_shape: the target's.
        rank: singular directions to keep, at most that many where an energy decides.
        is_transposed: the checkpoints store `(in, out)`.
        weight_bytes: bytes of both weights as they are read.
    """

    module: str
    lora_rank: int
    source_tensor: str
    target_tensor: str
    source_shape: tuple[int, int]
    target_shape: tuple[int, int]
    rank: int
    is_transposed: bool
    weight_bytes: int

    @property
    def is_reshaped(self) -> bool:
        """Whether source and target differ in shape, where no method is validated."""
        return self.source_shape != self.target_shape

    @property
    def reason(self) -> str:
        """Why the layer is treated in another way than the rest; empty in the plain case."""
        return "shapes differ: the published formula, unvalidated" if self.is_reshaped else ""


@dataclass(frozen=True)
class Plan:
    """What will be done to an adapter.

    Attributes:
        layers: a plan for each module to move, in the adapter's order.
        excluded: the modules that the user left out, with the reason.
        source_rule: how modules were found in the source.
        target_rule: how modules were found in the target.
        memory_bytes: estimate of the memory that the run takes beyond the libraries themselves.
    """

    layers: tuple[LayerPlan, ...]
    excluded: Mapping[str, str]
    source_rule: str
    target_rule: str
    memory_bytes: int

    def batches(self, limit: int = BATCH_BYTES) -> Iterator[list[LayerPlan]]:
        """Layers to work on together: equal shapes, and weights of at most `limit` bytes.

        Args:
            limit: bytes of the weights of a batch; a layer that has more comes alone.

        Yields:
            One or more layers.
        """
        groups: dict[object, list[LayerPlan]] = {}
        for layer in self.layers:
            groups.setdefault((layer.source_shape, layer.target_shape), []).append(layer)
        for group in groups.values():
            batch: list[LayerPlan] = []
            for layer in group:
                if batch and sum(x.weight_bytes for x in [*batch, layer]) > limit:
                    yield batch
                    batch = []
                batch.append(layer)
            yield batch


def make_plan(adapter: Adapter, source: Checkpoint, target: Checkpoint, settings: Settings) -> Plan:
    """Decide what to do with every layer of an adapter.

    Args:
        adapter: what is to be moved.
        source: the base model that it was trained on.
        target: the base model that it is moved to.
        settings: the options.

    Returns:
        The plan.

    Raises:
        MatchError: modules are missing, shapes do not fit, or the method needs equal shapes.
        CheckpointError: a weight is stored in a form that cannot be worked with.
        TransferError: a filter leaves nothing, or the rank is too large for a layer.
    """
    reasons = {module: settings.excludes(module) for module in adapter.layers}
    excluded = {module: reason for module, reason in reasons.items() if reason is not None}
    chosen = [module for module in adapter.layers if module not in excluded]
    if not chosen:
        example = next(iter(adapter.layers))
        raise TransferError(
            f"--include {settings.include} and --exclude {settings.exclude} leave none of the "
            f"adapter's {len(reasons)} modules; they are searched in paths such as {example}."
        )
    in_source = match(chosen, source, "source")
    in_target = match(chosen, target, "target")
    transposed = _transposed(adapter, source, in_source.tensors)
    layers = []
    for module in chosen:
        names = (in_source.tensors[module], in_target.tensors[module])
        layer = adapter.layers[module]
        default = layer.rank if adapter.is_lorax else DEFAULT_RANK
        planned = _plan_layer(layer, source, target, names, transposed[module], settings, default)
        layers.append(planned)
    plan = Plan(tuple(layers), excluded, in_source.rule, in_target.rule, 0)
    _check_method(plan, settings)
    return replace(plan, memory_bytes=_memory(plan, adapter))


def _plan_layer(
    layer: LoraLayer,
    source: Checkpoint,
    target: Checkpoint,
    names: tuple[str, str],
    is_transposed: bool,
    settings: Settings,
    default_rank: int,
) -> LayerPlan:
    for checkpoint, name in zip((source, target), names, strict=True):
        if checkpoint.dtype(name) not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{name} in {checkpoint.location} is stored as {checkpoint.dtype(name)}, expected "
                "float16, bfloat16, float32 or float64; use the model's unquantised weights."
            )
    stored = target.shape(names[1])
    if len(stored) != layer.lora_A.ndim or stored[2:] != layer.kernel_size:
        raise MatchError(
            f"{names[1]} in the target {target.location} has shape {stored}, expected "
            f"{layer.lora_A.ndim} dimensions"
            + (f" and a kernel of {layer.kernel_size}" if layer.is_conv else "")
            + f" as in the source; {layer.module} is another kind of layer there, leave it out "
            "with --exclude."
        )
    shapes = [
        as_matrix(checkpoint.shape(name), is_transposed)
        for checkpoint, name in zip((source, target), names, strict=True)
    ]
    sizes = [
        math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize
        for checkpoint, name in zip((source, target), names, strict=True)
    ]
    return LayerPlan(
        module=layer.module,
        lora_rank=layer.rank,
        source_tensor=names[0],
        target_tensor=names[1],
        source_shape=shapes[0],
        target_shape=shapes[1],
        rank=_rank(layer.module, min(*shapes[0], *shapes[1]), settings, default_rank),
        is_transposed=is_transposed,
        weight_bytes=sum(sizes),
    )


def as_matrix(shape: tuple[int, ...], is_transposed: bool) -> tuple[int, int]:
    """Shape `(out, in)` of a stored weight seen as a matrix; kernels count as inputs."""
    if is_transposed:
        return shape[1], shape[0]
    return shape[0], math.prod(shape[1:])


def _rank(module: str, side: int, settings: Settings, default: int) -> int:
    if settings.energy is not None:
        return min(settings.rank or side, side)
    if settings.rank is None:
        return min(default, side)
    if settings.rank > side:
        raise TransferError(
            f"rank {settings.rank} is larger than the shorter side, {side}, of {module}; give "
            f"--rank {side} or less, or leave it out for {DEFAULT_RANK} capped in each layer."
        )
    return settings.rank


def _transposed(
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
        turned = straight[1::-1] if not layer.is_conv else None
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


def _check_method(plan: Plan, settings: Settings) -> None:
    reshaped = [layer for layer in plan.layers if layer.is_reshaped]
    if reshaped and settings.method != "lorax":
        first = reshaped[0]
        raise MatchError(
            f"method {settings.method} needs equal shapes, but {first.module} goes from "
            f"{first.source_shape} to {first.target_shape} ({len(reshaped)} such modules); use "
            "--method lorax, whose formula for this case is unvalidated, or --exclude them."
        )


def _memory(plan: Plan, adapter: Adapter) -> int:
    """Adapter, its result as computed and as written, and the largest batch with its SVDs.

    A fifth is added for what an allocator keeps: 531 MB were measured where the sum is 457 MB.
    """
    factors = sum(x.lora_A.nbytes + x.lora_B.nbytes for x in adapter.layers.values())
    results = 4 * sum(x.lora_A.numel() + x.lora_B.numel() for x in adapter.layers.values())
    largest = 0
    for batch in plan.batches():
        size, temporaries = 0, 3 * BATCH_BYTES // 2
        for layer in batch:
            sides = sum(layer.source_shape) + sum(layer.target_shape)
            size += layer.weight_bytes + 4 * layer.rank * sides
            m, n = layer.target_shape
            # One matrix in float64 beside its float32 copy: the exact path.
            temporaries = max(temporaries, 12 * m * n + 24 * min(m, n) ** 2)
        largest = max(largest, size + temporaries)
    return int(1.2 * (2 * factors + results + largest))
