# SPDX-License-Identifier: Apache-2.0
"""From a plan to results: weights are read a few at a time, and only small things outlive them."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

import lorax_kernels as lk

from .adapters import Adapter, LoraLayer
from .bases import Basis, BasisMaker
from .checkpoints import Checkpoint
from .errors import CheckpointError
from .plan import BATCH_BYTES, LayerPlan, Plan
from .report import BasisFacts, LayerReport, Outcome, Similarity
from .settings import METHODS, Settings

Factors = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Result:
    """What came out for one module.

    Attributes:
        report: what was measured.
        layer: the moved update in float32, on the CPU; None where it is left out.
        basis: of the target's weight, where the engine keeps bases.
    """

    report: LayerReport
    layer: LoraLayer | None
    basis: lk.SVD | None = None


@dataclass(frozen=True)
class Engine:
    """Runs plans over one pair of base models.

    Attributes:
        source: the base model that the adapter was trained on.
        target: the base model that it is moved to.
        settings: the options.
        device: where to compute.
        bases: what makes the bases.
        batch_bytes: weights to work on at a time.
        keeps_bases: whether results carry the target's bases, as large as a LoRA of their rank.
    """

    source: Checkpoint
    target: Checkpoint
    settings: Settings
    device: torch.device
    bases: BasisMaker
    batch_bytes: int = BATCH_BYTES
    keeps_bases: bool = False

    def run(
        self, adapter: Adapter, plan: Plan, step: Callable[[int], None] = lambda count: None
    ) -> dict[str, Result]:
        """Measure and move every planned layer.

        Args:
            adapter: what is moved.
            plan: made for this adapter and these models.
            step: called with the number of layers done since the last call.

        Returns:
            Results by module path.

        Raises:
            CheckpointError: a weight cannot be read, or holds NaN or Inf.
        """
        results: dict[str, Result] = {}
        for batch in plan.batches(self.batch_bytes):
            layers = [adapter.layers[planned.module] for planned in batch]
            done = self._run_batch(batch, layers)
            results.update({planned.module: r for planned, r in zip(batch, done, strict=True)})
            step(len(batch))
        return results

    def _run_batch(self, plans: list[LayerPlan], layers: list[LoraLayer]) -> list[Result]:
        drifts, targets, sources = self._bases(plans)
        factors = [(layer.matrix_B, layer.matrix_A) for layer in layers]
        moved = _move(factors, plans, targets, sources, self.settings, self.device)
        results = []
        for i, (planned, layer) in enumerate(zip(plans, layers, strict=True)):
            report = LayerReport(
                module=planned.module,
                status="measured",
                reason=planned.reason,
                method=self.settings.method,
                lora_rank=layer.rank,
                rank=targets[i].svd.rank,
                source_tensor=planned.source_tensor,
                target_tensor=planned.target_tensor,
                source_shape=planned.source_shape,
                target_shape=planned.target_shape,
                is_validated=not planned.is_reshaped,
                source_basis=_facts(sources[i]),
                target_basis=_facts(targets[i]),
                similarity=_similarity(planned, sources[i].svd, targets[i].svd),
                drift=drifts[i],
                update_norm=lk.update_norm(*factors[i]) * abs(layer.scale),
                outcomes=_outcomes(factors[i], {m: moved[m][i] for m in moved if i in moved[m]}),
            )
            result = self._judge(report, layer, moved[self.settings.method][i])
            results.append(replace(result, basis=targets[i].svd if self.keeps_bases else None))
        return results

    def _bases(self, plans: list[LayerPlan]) -> tuple[list[float | None], list[Basis], list[Basis]]:
        """Drift, target's basis and source's basis of each layer; the weights end here."""
        targets = [self._read(self.target, x.target_tensor, x.is_transposed) for x in plans]
        sources = [self._read(self.source, x.source_tensor, x.is_transposed) for x in plans]
        drifts = [_drift(s, t) for s, t in zip(sources, targets, strict=True)]
        in_target = self.bases.make(targets, [x.rank for x in plans], self.settings.energy)
        # The target's basis decides the rank and is where the source's iteration starts: between
        # related models that leaves it two to four passes.
        in_source = dict(enumerate(in_target))
        rest = [i for i, drift in enumerate(drifts) if drift != 0]
        start = [None if plans[i].is_reshaped else in_target[i].svd for i in rest]
        made = self.bases.make(
            [sources[i] for i in rest], [in_target[i].svd.rank for i in rest], start=start
        )
        in_source.update(zip(rest, made, strict=True))
        return drifts, in_target, [in_source[i] for i in range(len(plans))]

    def _read(self, checkpoint: Checkpoint, name: str, is_transposed: bool) -> torch.Tensor:
        weight = checkpoint.read(name)
        if not bool(torch.isfinite(weight).all()):
            raise CheckpointError(
                f"{name} in {checkpoint.location} holds NaN or Inf, expected finite weights; the "
                "file is damaged or its training diverged, so get another copy."
            )
        weight = weight.flatten(1)
        return (weight.T.contiguous() if is_transposed else weight).to(self.device)

    def _judge(self, report: LayerReport, layer: LoraLayer, factors: Factors) -> Result:
        limit = self.settings.min_similarity
        if limit is not None:
            similarity = report.similarity
            reason = ""
            if similarity is None:
                reason = "no similarity is defined between different shapes"
            elif similarity.smaller < limit:
                reason = f"similarity {similarity.smaller:.3f} is below {limit:g}"
            if reason:
                return Result(replace(report, status="left out", reason=reason), None)
        reasons = [report.reason] if report.reason else []
        if report.drift == 0:
            reasons.append("base weights are identical")
        if not report.outcomes:
            reasons.append("the update is zero")
        error = report.svd_error or 0.0
        if error > self.bases.tol:
            reasons.append(f"basis error {error:.1e} is above {self.bases.tol:g}")
        moved = layer.with_factors(*factors)
        return Result(replace(report, reason="; ".join(reasons)), moved)


def _move(
    factors: list[Factors],
    plans: list[LayerPlan],
    targets: list[Basis],
    sources: list[Basis],
    settings: Settings,
    device: torch.device,
) -> dict[str, dict[int, Factors]]:
    """The factors by every method, for the layers that it is defined for."""
    moved: dict[str, dict[int, Factors]] = {}
    wide = [(B.to(device, torch.float32), A.to(device, torch.float32)) for B, A in factors]
    for method in METHODS:
        chosen = [i for i, x in enumerate(plans) if method == "lorax" or not x.is_reshaped]
        if not chosen:
            moved[method] = {}
            continue
        if method == "copy":
            # Not through float32: a copy is exact.
            moved[method] = {i: factors[i] for i in chosen}
            continue
        with warnings.catch_warnings():
            # The report says it of each layer.
            warnings.simplefilter("ignore", lk.UnvalidatedTransferWarning)
            lora_B, lora_A = lk.transfer_lora(
                [wide[i][0] for i in chosen],
                [wide[i][1] for i in chosen],
                [targets[i].svd for i in chosen],
                [sources[i].svd for i in chosen],
                method,
                backend=settings.backend,
            )
        pairs = zip(chosen, lora_B, lora_A, strict=True)
        moved[method] = {i: (B.cpu(), A.cpu()) for i, B, A in pairs}
    return moved


def _outcomes(before: Factors, after: dict[str, Factors]) -> dict[str, Outcome]:
    norm = lk.update_norm(*before)
    if norm == 0:
        return {}
    outcomes = {}
    for method, (B, A) in after.items():
        ratio = lk.update_norm(B, A) / norm
        change = None
        if (len(B), A.shape[1]) == (len(before[0]), before[1].shape[1]):
            inner = lk.update_inner(B, A, *before) / norm**2
            change = 0.0 if method == "copy" else math.sqrt(max(0.0, ratio**2 - 2 * inner + 1))
        outcomes[method] = Outcome(ratio**2, ratio, change)
    return outcomes


def _drift(source: torch.Tensor, target: torch.Tensor) -> float | None:
    """`||W_t - W_s|| / ||W_s||`; None where shapes differ or the source is zero."""
    if source.shape != target.shape:
        return None
    if source.dtype == target.dtype and torch.equal(source, target):
        return 0.0
    norm = torch.linalg.vector_norm(source, dtype=torch.float64)
    if norm == 0:
        return None
    # Row by row: a whole difference in float32 would be another weight in memory.
    rows = max(1, (1 << 20) // source.shape[1])
    squares = [
        torch.linalg.vector_norm(t.double() - s.double()) ** 2
        for s, t in zip(source.split(rows), target.split(rows), strict=True)
    ]
    return float(torch.stack(squares).sum().sqrt() / norm)


def _facts(basis: Basis) -> BasisFacts:
    svd = basis.svd
    return BasisFacts(svd.rank, float(svd.error), int(svd.passes), str(svd.path), basis.is_cached)


def _similarity(planned: LayerPlan, source: lk.SVD, target: lk.SVD) -> Similarity | None:
    if planned.is_reshaped:
        return None
    return Similarity(*lk.subspace_similarity(source, target))
