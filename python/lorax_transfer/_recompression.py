# SPDX-License-Identifier: Apache-2.0
"""What `resize` and `merge` report, as plain data; docs/doors.md describes the JSON."""

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .adapters import LoraLayer

SCHEMA = "lorax-transfer-recompression/1"


@dataclass(frozen=True)
class Part:
    """One adapter that went in.

    Attributes:
        location: where it was read from.
        content_hash: of its tensor file.
        weight: what it was multiplied with; 1 for a resized adapter.
        layers: modules that it adapts.
        base_model: the base model that it names.
    """

    location: str
    content_hash: str
    weight: float
    layers: int
    base_model: str | None


@dataclass(frozen=True)
class LayerRecord:
    """One module of the result; `dW` is its exact update, `dW'` the one that is written.

    Attributes:
        module: its path.
        rank_before: rank of the factors that went in, concatenated where there are several.
        rank: rank of the result.
        energy_kept: share of `||dW||_F^2` in the singular values kept; None where `dW` is zero.
        spectral_error: `||dW - dW'||_2 / ||dW||_2`, the first singular value cut off over the
            largest; None where `dW` is zero.
        error: `||dW - dW'||_F / ||dW||_F` of the written factors, rounding included; None where
            `dW` is zero.
        update_norm: `||dW||_F`.
        reason: why, where it is not the plain case; empty otherwise.
    """

    module: str
    rank_before: int
    rank: int
    energy_kept: float | None
    spectral_error: float | None
    error: float | None
    update_norm: float
    reason: str = ""


@dataclass(frozen=True)
class Sizes:
    """The layers together.

    Attributes:
        layers: modules.
        changed: of these, those that lost rank.
        parameters_before: numbers in the factors that went in.
        parameters: numbers in the factors of the result.
        energy_kept: share of the whole update's energy; None where all of it is zero.
        spectral_error: largest of the layers.
        error: relative Frobenius error of the whole.
    """

    layers: int
    changed: int
    parameters_before: int
    parameters: int
    energy_kept: float | None
    spectral_error: float | None
    error: float | None


@dataclass(frozen=True)
class Recompression:
    """What `resize` or `merge` did; docs/doors.md describes the JSON.

    Attributes:
        kind: "resize" or "merge".
        version: of this package.
        command: command line, or None.
        inputs: the adapters that went in.
        settings: the options.
        layers: one record for each module.
        totals: the layers together.
        warnings: what should not be missed.
        seconds: duration.
        output: directory that was written, None for a dry run.
    """

    kind: str
    version: str
    command: str | None
    inputs: tuple[Part, ...]
    settings: dict[str, Any]
    layers: tuple[LayerRecord, ...]
    totals: Sizes
    warnings: tuple[str, ...]
    seconds: float
    output: str | None

    def to_json(self) -> str:
        """The report as JSON text with a final newline; no NaN, no infinity."""
        data = {"schema": SCHEMA, **dataclasses.asdict(self)}
        return json.dumps(data, indent=2, allow_nan=False) + "\n"


def parameters(layers: Iterable[LoraLayer]) -> int:
    """Numbers in the factors of layers."""
    return sum(layer.lora_A.numel() + layer.lora_B.numel() for layer in layers)


def sizes(
    records: Sequence[LayerRecord], layers: Sequence[LoraLayer], parameters_before: int
) -> Sizes:
    """The layers together, means weighted by the energy of each."""
    measured = [x for x in records if x.error is not None]
    total = sum(x.update_norm**2 for x in measured)

    def mean(values: Iterable[float]) -> float | None:
        weights = [x.update_norm**2 / total for x in measured] if total else []
        return sum(w * v for w, v in zip(weights, values, strict=True)) if weights else None

    squared = mean((x.error or 0.0) ** 2 for x in measured)
    return Sizes(
        layers=len(records),
        changed=sum(x.rank < x.rank_before for x in records),
        parameters_before=parameters_before,
        parameters=parameters(layers),
        energy_kept=mean(x.energy_kept or 0.0 for x in measured),
        spectral_error=max((x.spectral_error or 0.0 for x in measured), default=None),
        error=None if squared is None else math.sqrt(squared),
    )
