# SPDX-License-Identifier: Apache-2.0
"""What lies outside of the adapted layers: how far it moved, and how embeddings are given back.

An adapter of linear layers does not reach a model's embeddings, and a fine-tune may move them
farther than anything else (docs/quality.md). PEFT has adapters of embeddings too; where the output
layer is tied to them it needs the same update once more, under that layer's name.
"""

import math
from dataclasses import dataclass, replace

import torch

import lorax_kernels as lk

from ._weights import energies, read_matrix, relative_drift
from .adapters import LoraLayer
from .checkpoints import Checkpoint
from .errors import MatchError
from .matching import EMBEDDINGS, HEADS, is_head, tied_tensor
from .plan import WEIGHT_DTYPES, Plan
from .report import EmbeddingReport
from .settings import Settings

# Components of a path in front of which a model's output layer stands.
_BODIES = frozenset({"model", "transformer", "gpt_neox"})


@dataclass(frozen=True)
class Table:
    """An embedding table, or an output layer.

    Attributes:
        module: its path, as the adapter names modules.
        source_tensor: its weight in the source.
        target_tensor: its weight in the target.
        is_output: whether it is an output layer, a linear one.
    """

    module: str
    source_tensor: str
    target_tensor: str
    is_output: bool


@dataclass(frozen=True)
class Beyond:
    """What was found outside of the adapted layers.

    Attributes:
        reports: of every embedding table and output layer.
        layers: the updates that give their drift back; empty where that was not asked for.
        drift: `||W_t - W_s|| / ||W_s||` of all other weights that no layer of the adapter is on,
            taken together; None where there are none.
    """

    reports: tuple[EmbeddingReport, ...] = ()
    layers: tuple[LoraLayer, ...] = ()
    drift: float | None = None

    @property
    def embedding_drift(self) -> float | None:
        """The largest drift of an embedding table or output layer."""
        return max((x.drift for x in self.reports if x.drift is not None), default=None)

    def left(self, is_given_back: bool) -> float | None:
        """The largest drift of what stays the target's.

        Args:
            is_given_back: whether embeddings do not stay so.
        """
        drifts = [self.drift, None if is_given_back else self.embedding_drift]
        return max((x for x in drifts if x is not None), default=None)


def find_tables(plan: Plan, source: Checkpoint, target: Checkpoint) -> list[Table]:
    """The embedding tables and output layers that two models share and the adapter is not on.

    Those that it is on are layers of the plan.

    Args:
        plan: how the adapter's modules are named in both.
        source: the base model of the adapter.
        target: the base model that it is moved to.

    Returns:
        The tables; an output layer that the target ties comes under its own path with the
        embeddings' tensors.
    """
    names = _Names(plan, source)
    tied = tied_tensor(target)
    adapted = {layer.module: layer.target_tensor for layer in plan.layers}
    # An adapter may be on the output layer of tied weights and leave the embeddings alone, or not.
    known = {tensor for module, tensor in adapted.items() if not is_head(module)}
    tables = []
    for name in target.names():
        module, old = names.module(name), names.in_source(name)
        if name.endswith(EMBEDDINGS) and old is not None:
            if name not in known:
                tables.append(Table(module, old, name, False))
            head = _output_of(module) if name == tied else None
            if head is not None and head not in adapted:
                old = names.in_source(f"{head}.weight", is_module=True) or old
                tables.append(Table(head, old, name, True))
        elif is_head(name) and module not in adapted and tied is None:
            old = old or tied_tensor(source)
            if old is not None:
                tables.append(Table(module, old, name, True))
    return sorted(tables, key=lambda table: table.is_output)


def look_beyond(
    plan: Plan,
    source: Checkpoint,
    target: Checkpoint,
    settings: Settings,
    device: torch.device,
) -> Beyond:
    """Measure what the adapter is not on, and make the updates that give embeddings back.

    Args:
        plan: how the adapter is moved.
        source: its base model.
        target: the base model that it is moved to.
        settings: the options.
        device: where to compute.

    Returns:
        What was found.

    Raises:
        MatchError: embeddings are to be given back, and there are none, or of other shapes.
        CheckpointError: a weight cannot be read.
    """
    tables = find_tables(plan, source, target)
    if settings.embeddings and not tables and not any(x.given_back for x in plan.layers):
        raise MatchError(
            f"the target {target.location} has no embeddings that the source has too (tensors that "
            f"end in {', '.join(EMBEDDINGS)}), so none can be given back; leave --embeddings out."
        )
    reports, layers = [], []
    done: dict[tuple[str, str], tuple[EmbeddingReport, LoraLayer | None]] = {}
    for table in tables:
        key = (table.source_tensor, table.target_tensor)
        if key not in done:
            done[key] = _give_back(table, source, target, settings, device)
        report, layer = done[key]
        reports.append(replace(report, module=table.module, is_output=table.is_output))
        if layer is not None:
            layers.append(replace(layer, module=table.module, is_embedding=not table.is_output))
    return Beyond(
        tuple(reports),
        tuple(layers),
        drift=_rest(plan, tables, source, target),
    )


def _give_back(
    table: Table, source: Checkpoint, target: Checkpoint, settings: Settings, device: torch.device
) -> tuple[EmbeddingReport, LoraLayer | None]:
    shapes = source.shape(table.source_tensor), target.shape(table.target_tensor)
    report = EmbeddingReport(
        table.module, table.source_tensor, table.target_tensor, shapes[0], shapes[1]
    )
    if shapes[0] != shapes[1]:
        if settings.embeddings:
            raise MatchError(
                f"{table.target_tensor} has shape {shapes[1]}, but {shapes[0]} in the source, so "
                "that its drift is not defined; leave --embeddings out."
            )
        return report, None
    E_s = read_matrix(source, table.source_tensor, False, device)
    E_t = read_matrix(target, table.target_tensor, False, device)
    drift = relative_drift(E_s, E_t)
    report = replace(report, drift=drift)
    if not settings.embeddings or not drift:
        return report, None
    B, A = lk.restore_embedding(
        E_s, E_t, directions=settings.directions, strength=settings.embeddings
    )
    energy = (drift * float(torch.linalg.vector_norm(E_s, dtype=torch.float64))) ** 2
    held = lk.update_norm(B, A) ** 2 / settings.embeddings**2 / energy
    layer = LoraLayer(table.module, A.cpu(), B.cpu(), 1.0)
    return replace(report, rank=len(A), drift_undone=settings.embeddings * held), layer


def _rest(plan: Plan, tables: list[Table], source: Checkpoint, target: Checkpoint) -> float | None:
    """The drift of everything else, a tensor at a time."""
    names = _Names(plan, source)
    known = {layer.target_tensor for layer in plan.layers} | {x.target_tensor for x in tables}
    moved = size = 0.0
    for name in target.names():
        old = names.in_source(name)
        if name in known or is_head(name) or old is None:
            continue
        if source.shape(old) != target.shape(name):
            continue
        if not {source.dtype(old), target.dtype(name)} <= set(WEIGHT_DTYPES):
            continue
        found = energies(source.read(old), target.read(name))
        moved, size = moved + found[0], size + found[1]
    drift = math.sqrt(moved / size) if size > 0 else math.nan
    return drift if math.isfinite(drift) else None


def _output_of(module: str) -> str | None:
    """Path of the output layer that is tied to an embedding; None where the model has none."""
    parts = module.split(".")
    body = next((i for i, part in enumerate(parts[:-1]) if part in _BODIES), None)
    if body is None:
        return None
    return ".".join([*parts[:body], HEADS[1] if parts[-1] == "embed_in" else HEADS[0]])


class _Names:
    """Names of tensors in the target, as the adapter's paths and in the source.

    What they start with may differ; it is told from a module that the plan has matched.
    """

    def __init__(self, plan: Plan, source: Checkpoint) -> None:
        layer = max(plan.layers, key=lambda x: x.module.count("."))
        self._there = set(source.names())
        self._source, self._target = (
            _unlike(layer.module, tensor.removesuffix(".weight"))
            for tensor in (layer.source_tensor, layer.target_tensor)
        )

    def module(self, tensor: str) -> str:
        """Path of a tensor's module as the adapter names modules."""
        ours, theirs = self._target
        name = tensor.removesuffix(".weight")
        return ours + name.removeprefix(theirs) if name.startswith(theirs) else name

    def in_source(self, tensor: str, is_module: bool = False) -> str | None:
        """The source's name of a target's tensor, or of one named by its module; None without."""
        ours, theirs = self._target
        if not is_module and tensor.startswith(theirs):
            tensor = ours + tensor.removeprefix(theirs)
        ours, theirs = self._source
        names = [tensor]
        if tensor.startswith(ours):
            names.insert(0, theirs + tensor.removeprefix(ours))
        return next((name for name in names if name in self._there), None)


def _unlike(module: str, tensor: str) -> tuple[str, str]:
    """What two paths start with before they agree."""
    ours, theirs = module.split("."), tensor.split(".")
    while ours and theirs and ours[-1] == theirs[-1]:
        ours.pop()
        theirs.pop()
    first, second = ("".join(f"{part}." for part in parts) for parts in (ours, theirs))
    return first, second
