# SPDX-License-Identifier: Apache-2.0
"""A batch of updates by every method, side by side, and what each method does to them."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

import lorax_kernels as lk

from .report import Outcome
from .settings import METHODS, RESHAPING, Settings, restored_share

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Batch:
    """Layers of one shape with everything that a method may ask for; an entry a layer.

    Attributes:
        factors: `lora_B` and `lora_A` as matrices, as the adapter holds them.
        scales: what multiplies their product.
        source_weights: `(out, in)`, on the device to compute on.
        target_weights: likewise.
        sources: bases of the source's weights.
        targets: bases of the target's weights.
        drifts: `||W_t - W_s|| / ||W_s||`; None where it is not defined.
        aligned: the factors by method "aligned"; empty where the models were not aligned.
        outside: drift of what lies outside of the adapted layers and stays the target's.
        given_back: for each layer the share of its drift that "restore" undoes whatever the
            settings say, and without an update too; 0 for what they say.
    """

    factors: list[Factors]
    scales: list[float]
    source_weights: list[torch.Tensor]
    target_weights: list[torch.Tensor]
    sources: list[lk.SVD]
    targets: list[lk.SVD]
    drifts: list[float | None]
    aligned: list[Factors]
    given_back: list[float]
    outside: float | None = None

    @property
    def is_reshaped(self) -> bool:
        """Whether the two models' weights differ in shape."""
        return self.source_weights[0].shape != self.target_weights[0].shape


def move(batch: Batch, settings: Settings, workspace: int = 4 << 30) -> dict[str, list[Factors]]:
    """The factors by every method that is defined for the batch.

    Args:
        batch: the layers.
        settings: the options.
        workspace: bytes of temporaries that may be taken.

    Returns:
        For each method the factors of each layer, on the CPU; in float32, but of a copy.
    """
    device = batch.target_weights[0].device
    wide = [[x.to(device, torch.float32) for x in pair] for pair in batch.factors]
    B, A = ([pair[side] for pair in wide] for side in (0, 1))
    moved: dict[str, list[Factors]] = {}
    for method in METHODS:
        if batch.is_reshaped and method not in RESHAPING:
            continue
        if method == "aligned":
            if batch.aligned:
                moved[method] = batch.aligned
            continue
        if method == "copy":
            # Not through float32: a copy is exact.
            moved[method] = batch.factors
            continue
        if method in ("anchor", "restore"):
            lora_B, lora_A = _undo(method, B, A, batch, settings, workspace)
        else:
            with warnings.catch_warnings():
                # The report says it of each layer.
                warnings.simplefilter("ignore", lk.UnvalidatedTransferWarning)
                lora_B, lora_A = lk.transfer_lora(
                    B, A, batch.targets, batch.sources, method, backend=settings.backend
                )
        moved[method] = [(b.cpu(), a.cpu()) for b, a in zip(lora_B, lora_A, strict=True)]
    return moved


def _undo(
    method: str,
    B: list[torch.Tensor],
    A: list[torch.Tensor],
    batch: Batch,
    settings: Settings,
    workspace: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A layer without an update stays so: there is nothing that drift could stand in the way of.

    But embeddings are given back whatever there is.
    """
    new_B, new_A = list(B), list(A)
    live = [i for i, s in enumerate(batch.scales) if s != 0 and lk.update_norm(B[i], A[i]) > 0]
    if method == "restore":
        given_back = {i for i, share in enumerate(batch.given_back) if share}
        drifted = {i for i in given_back if batch.drifts[i]}
        live = sorted((set(live) - given_back) | drifted)
    some = [[x[i] for i in live] for x in (B, A, batch.source_weights, batch.target_weights)]
    scales = [batch.scales[i] for i in live]
    strength, backend = settings.strength, settings.backend
    if method == "anchor":
        strength = 1.0 if strength is None else strength
        done = lk.anchor_lora(*some, scale=scales, strength=strength, sides="both", backend=backend)
    else:
        shares = [
            batch.given_back[i]
            or (restored_share(batch.drifts[i], batch.outside) if strength is None else strength)
            for i in live
        ]
        done = lk.restore_lora(
            *some,
            scale=scales,
            strength=shares,
            directions=settings.directions,
            backend=backend,
            workspace=workspace,
        )
    for i, b, a in zip(live, *done, strict=True):
        new_B[i], new_A[i] = b, a
    return new_B, new_A


def outcomes(batch: Batch, moved: Mapping[str, list[Factors]]) -> list[dict[str, Outcome]]:
    """What each method does to each update.

    Args:
        batch: the layers.
        moved: what `move` made of them.

    Returns:
        For each layer the outcomes by method; empty where the update is zero.
    """
    found = []
    for i, before in enumerate(batch.factors):
        norm = lk.update_norm(*before)
        after = {method: pairs[i] for method, pairs in moved.items()} if norm else {}
        undone = {} if batch.is_reshaped else _undone(batch, i, after)
        found.append(
            {
                method: _outcome(method, before, pair, norm, undone.get(method))
                for method, pair in after.items()
            }
        )
    return found


def _outcome(
    method: str, before: Factors, after: Factors, norm: float, undone: float | None
) -> Outcome:
    B, A = after
    ratio = lk.update_norm(B, A) / norm
    change = None
    if (len(B), A.shape[1]) == (len(before[0]), before[1].shape[1]):
        inner = lk.update_inner(B, A, *before) / norm**2
        change = 0.0 if method == "copy" else math.sqrt(max(0.0, ratio**2 - 2 * inner + 1))
    return Outcome(ratio**2, ratio, change, B.shape[1], undone)


def _undone(batch: Batch, i: int, after: Mapping[str, Factors]) -> dict[str, float]:
    """`-<dW_t - dW, D> / ||D||^2` of each method, from one product with the drift `D`."""
    source, target = batch.source_weights[i], batch.target_weights[i]
    drift = batch.drifts[i]
    if not drift or not after:
        return {}
    energy = (drift * float(torch.linalg.vector_norm(source, dtype=torch.float64))) ** 2
    before = batch.factors[i]
    rows = [before[1], *(A for _, A in after.values())]
    stacked = torch.cat([A.float() for A in rows]).to(target.device)
    products = lk.drift_product(source, target, stacked.mT).cpu().split([len(A) for A in rows], 1)
    inner = [
        float((product * B.double()).sum()) * batch.scales[i]
        for product, (B, _) in zip(products, [before, *after.values()], strict=True)
    ]
    return {
        method: 0.0 if method == "copy" else (inner[0] - own) / energy
        for method, own in zip(after, inner[1:], strict=True)
    }
