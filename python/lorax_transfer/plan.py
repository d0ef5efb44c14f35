# SPDX-License-Identifier: Apache-2.0
"""What will be done to each layer and why, decided from names and shapes alone."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ._weights import as_matrix, transposed_modules
from .adapters import Adapter, LoraLayer
from .checkpoints import Checkpoint
from .errors import CheckpointError, MatchError, TransferError
from .matching import is_head, match
from .settings import DEFAULT_RANK, RESHAPING, Settings

if TYPE_CHECKING:
    from ._alignment import Alignment

# Weights in memory at a time, both models together, unless a single layer needs more. With 256 MiB
# a model of 1.1 B parameters peaks some 300 MB higher (benchmarks/transfer/memory.py).
BATCH_BYTES = 128 << 20

# What a weight may be stored in.
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        target_module: its path in the target.
        is_table: it is an embedding table or an output layer.
        given_back: share of its drift to undo because embeddings are to be given back; its update
            is then carried as it is.
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
    target_module: str
    is_table: bool = False
    given_back: float = 0.0

    def method(self, chosen: str) -> str:
        """The method that moves it, where `chosen` moves the other layers.

        Its update and a share of its drift, taken back: that is what "restore" is.
        """
        return "restore" if self.given_back else chosen

    @property
    def is_reshaped(self) -> bool:
        """Whether source and target differ in shape, where no method is validated."""
        return self.source_shape != self.target_shape

    @property
    def reason(self) -> str:
        """Why the layer is treated in another way than the rest; empty in the plain case."""
        reasons = ["shapes differ: unvalidated"] if self.is_reshaped else []
        if self.target_module != self.module:
            reasons.append(f"goes to {self.target_module}")
        if self.given_back:
            reasons.append(f"carried as it is, with {self.given_back:.0%} of the drift given back")
        return "; ".join(reasons)


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


def make_plan(
    adapter: Adapter,
    source: Checkpoint,
    target: Checkpoint,
    settings: Settings,
    alignment: "Alignment | None" = None,
) -> Plan:
    """Decide what to do with every layer of an adapter.

    Args:
        adapter: what is to be moved.
        source: the base model that it was trained on.
        target: the base model that it is moved to.
        settings: the options.
        alignment: which modules correspond; None where they have the same paths.

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
    if alignment is None:
        in_source, in_target = match(chosen, source, "source"), match(chosen, target, "target")
        source_tensors, target_tensors = in_source.tensors, in_target.tensors
        rules, targets = (in_source.rule, in_target.rule), {module: module for module in chosen}
    else:
        excluded |= alignment.unmatched
        chosen = [module for module in chosen if module not in alignment.unmatched]
        targets = alignment.modules
        source_tensors = {module: alignment.source.tensor(module) for module in chosen}
        target_tensors = {x: alignment.target.tensor(targets[x]) for x in chosen}
        rules = (alignment.source.rule, alignment.target.rule)
    transposed = transposed_modules(adapter, source, source_tensors)
    layers = []
    for module in chosen:
        names = (source_tensors[module], target_tensors[module])
        layer = adapter.layers[module]
        default = layer.rank if adapter.is_lorax else DEFAULT_RANK
        planned = _plan_layer(layer, source, target, names, transposed[module], settings, default)
        layers.append(replace(planned, target_module=targets[module]))
    plan = Plan(tuple(layers), excluded, *rules, 0)
    _check_tables(plan, adapter, settings)
    _check_method(plan, settings)
    beyond = 0
    if settings.embeddings or (alignment is None and not any(x.is_reshaped for x in layers)):
        beyond = _beyond(source, target, settings)
    return replace(plan, memory_bytes=_memory(plan, adapter, alignment, beyond))


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
        if checkpoint.dtype(name) not in WEIGHT_DTYPES:
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
    is_table = layer.is_embedding or is_head(layer.module)
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
        target_module=layer.module,
        is_table=is_table,
        given_back=settings.embeddings if is_table else 0.0,
    )


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


def _check_tables(plan: Plan, adapter: Adapter, settings: Settings) -> None:
    """Tokens have no counterpart in another vocabulary; widths have one by method aligned only."""
    tables = [x for x in plan.layers if x.is_table and x.is_reshaped]
    if settings.method == "aligned":
        tables = [x for x in tables if x.source_shape[0] != x.target_shape[0]]
    embeddings = [x for x in tables if adapter.layers[x.module].is_embedding]
    if not embeddings and not any(x.given_back for x in tables):
        return
    heads = [x.module for x in tables if x not in embeddings]
    shown = ", ".join(
        f"{x.module} is {x.source_shape} in the source and {x.target_shape} in the target"
        for x in tables
    )
    advice = ["--drop embedding"] if embeddings else []
    advice += [f"--exclude '{'|'.join(heads)}'"] if heads else []
    raise MatchError(
        f"the adapter updates embeddings or an output layer, and {shown} (vocabulary, width), but "
        "such an update has a meaning only for the tokens and the width that it was made for; "
        f"leave it behind with {' and '.join(advice)}."
    )


def _check_method(plan: Plan, settings: Settings) -> None:
    reshaped = [layer for layer in plan.layers if layer.is_reshaped]
    if reshaped and settings.method not in RESHAPING:
        first = reshaped[0]
        raise MatchError(
            f"method {settings.method} needs equal shapes, but {first.module} goes from "
            f"{first.source_shape} to {first.target_shape} ({len(reshaped)} such modules); use "
            "--method aligned, or lorax, whose formula for this case is unvalidated, or --exclude "
            "them."
        )


def _beyond(source: Checkpoint, target: Checkpoint, settings: Settings) -> int:
    """The largest tensor of both models: embeddings are compared too, whole, and may be updated."""
    largest = 0
    for checkpoint in (source, target):
        sizes = [(x, math.prod(checkpoint.shape(x))) for x in checkpoint.names()]
        name, size = max(sizes, key=lambda pair: pair[1])
        # A byte a number tells which are finite.
        largest += size * (checkpoint.dtype(name).itemsize + 1)
        if settings.embeddings:
            largest += 8 * settings.directions * sum(checkpoint.shape(name))
    return largest


def _memory(plan: Plan, adapter: Adapter, alignment: "Alignment | None", beyond: int) -> int:
    """Adapter, its result as computed and as written, and the largest batch with its SVDs.

    A fifth is added for what an allocator keeps: 531 MB were measured where the sum is 457 MB.
    """
    factors = sum(x.lora_A.nbytes + x.lora_B.nbytes for x in adapter.layers.values())
    results = 4 * sum(x.lora_A.numel() + x.lora_B.numel() for x in adapter.layers.values())
    largest = beyond
    for batch in plan.batches():
        size, temporaries = 0, 3 * BATCH_BYTES // 2
        for layer in batch:
            sides = sum(layer.source_shape) + sum(layer.target_shape)
            size += layer.weight_bytes + 4 * layer.rank * sides
            m, n = layer.target_shape
            # One matrix in float64 beside its float32 copy: the exact path.
            temporaries = max(temporaries, 12 * m * n + 24 * min(m, n) ** 2)
        largest = max(largest, size + temporaries)
    if alignment is not None and alignment.stream is not None:
        # An inner map with its eigenproblem in float64, beside the weights that it comes from.
        for layer in plan.layers:
            short, long = sorted((max(layer.source_shape), max(layer.target_shape)))
            largest = max(largest, 24 * short * (long + short) + 6 * layer.weight_bytes)
    return int(1.2 * (2 * factors + results + largest))
