# SPDX-License-Identifier: Apache-2.0
"""The layers of a report added up, each weighted by the energy of its update."""

import math
from collections.abc import Collection, Sequence

from .report import LayerReport, Outcome, Totals
from .settings import METHODS


def total(layers: Sequence[LayerReport], tol: float, tables: Collection[str] = ()) -> Totals:
    """Add the layers up.

    Args:
        layers: every layer of the adapter.
        tol: the tolerance that bases should have reached.
        tables: modules of embeddings and output layers; their drift counts for itself, unless there
            is no other layer.

    Returns:
        The totals.
    """
    measured = [x for x in layers if x.is_measured]
    written = [x for x in layers if x.status == "transferred"]
    similar = [(x, x.similarity) for x in measured if x.similarity is not None]
    told = [(x, s.excess) for x, s in similar if s.excess is not None]
    inner = [x for x in measured if x.module not in tables] or measured
    drifts = [(x, x.drift) for x in inner if x.drift is not None]
    inside = [(x, x.outcomes["lorax"]) for x in measured if "lorax" in x.outcomes]
    same_methods = [name for name in METHODS if any(name in x.outcomes for x in measured)]
    return Totals(
        layers=len(layers),
        transferred=len(written),
        left_out=sum(x.status == "left out" for x in layers),
        excluded=sum(x.status == "excluded" for x in layers),
        unvalidated=sum(not x.is_validated for x in layers),
        above_tolerance=sum((x.svd_error or 0.0) > tol for x in layers),
        energy_written=_energy_written(layers, written),
        drift=_mean(drifts),
        drift_max=max((drift for _, drift in drifts), default=None),
        similarity=_mean([(x, s.smaller) for x, s in similar]),
        chance=_mean([(x, s.chance_U if s.U <= s.V else s.chance_V) for x, s in similar]),
        similarity_excess=_mean(told),
        in_subspace=_mean([(x, outcome.energy_kept) for x, outcome in inside]),
        in_subspace_chance=_mean(
            [(x, x.similarity.chance_U * x.similarity.chance_V) for x, _ in inside if x.similarity]
        ),
        methods={name: _together(measured, name) for name in same_methods},
    )


def _weight(layer: LayerReport) -> float:
    return (layer.update_norm or 0.0) ** 2


def _mean(values: Sequence[tuple[LayerReport, float]]) -> float | None:
    """Mean weighted by the energy of the updates; plain if no update has any."""
    if not values:
        return None
    weights = [_weight(layer) for layer, _ in values]
    if not sum(weights) > 0:
        weights = [1.0] * len(values)
    weighted = [w * value for w, (_, value) in zip(weights, values, strict=True)]
    return math.fsum(weighted) / math.fsum(weights)


def _together(layers: Sequence[LayerReport], method: str) -> Outcome:
    of = [(x, x.outcomes[method]) for x in layers if method in x.outcomes]
    kept = _mean([(x, outcome.energy_kept) for x, outcome in of]) or 0.0
    squares = [(x, o.change**2) for x, o in of if o.change is not None]
    change = _mean(squares) if len(squares) == len(of) else None
    undone = _mean([(x, o.drift_undone) for x, o in of if o.drift_undone is not None])
    return Outcome(
        kept,
        math.sqrt(kept),
        None if change is None else math.sqrt(change),
        max((outcome.rank for _, outcome in of), default=0),
        undone,
    )


def _energy_written(layers: Sequence[LayerReport], written: Sequence[LayerReport]) -> float | None:
    energy = math.fsum(_weight(layer) for layer in layers)
    if not written or not energy > 0:
        return None
    return math.fsum(
        _weight(x) * (x.outcome.energy_kept if x.outcome else 0.0) for x in written
    ) / (energy)
