# SPDX-License-Identifier: Apache-2.0
"""From a plan to results: weights are read a few at a time, and only small things outlive them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

import lorax_kernels as lk

from ._moves import Batch, Factors, move, outcomes
from ._weights import read_matrix, relative_drift
from .adapters import Adapter, LoraLayer
from .bases import Basis, BasisMaker
from .checkpoints import Checkpoint
from .plan import BATCH_BYTES, LayerPlan, Plan
from .report import BasisFacts, LayerReport, Similarity
from .settings import Settings


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
        aligned: factors of method "aligned" by module, where it was asked for.
        outside: drift of what lies outside of the adapted layers and stays the target's.
        keeps_bases: whether results carry the target's bases, as large as a LoRA of their rank.
    """

    source: Checkpoint
    target: Checkpoint
    settings: Settings
    device: torch.device
    bases: BasisMaker
    batch_bytes: int = BATCH_BYTES
    keeps_bases: bool = False
    aligned: Mapping[str, Factors] = field(default_factory=dict)
    outside: float | None = None

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
        firsts = _firsts(adapter, plan)
        some = [planned for planned in plan.layers if planned.module not in firsts]
        for batch in replace(plan, layers=tuple(some)).batches(self.batch_bytes):
            layers = [_live(adapter.layers[planned.module], planned) for planned in batch]
            done = self._run_batch(batch, layers)
            results.update({planned.module: r for planned, r in zip(batch, done, strict=True)})
            step(len(batch))
        for planned in plan.layers:
            if planned.module in firsts:
                results[planned.module] = _again(
                    results[firsts[planned.module]], planned, adapter.layers[planned.module]
                )
                step(1)
        return results

    def _run_batch(self, plans: list[LayerPlan], layers: list[LoraLayer]) -> list[Result]:
        # The weights end with this call: results hold nothing of their size.
        sources = [
            read_matrix(self.source, x.source_tensor, x.is_transposed, self.device) for x in plans
        ]
        targets = [
            read_matrix(self.target, x.target_tensor, x.is_transposed, self.device) for x in plans
        ]
        drifts = [relative_drift(s, t) for s, t in zip(sources, targets, strict=True)]
        in_source, in_target = self._bases(plans, sources, targets, drifts)
        batch = Batch(
            factors=[(layer.matrix_B, layer.matrix_A) for layer in layers],
            scales=[layer.scale for layer in layers],
            source_weights=sources,
            target_weights=targets,
            sources=[basis.svd for basis in in_source],
            targets=[basis.svd for basis in in_target],
            drifts=drifts,
            aligned=[self.aligned[x.module] for x in plans] if self.aligned else [],
            given_back=[x.given_back for x in plans],
            outside=self.outside,
        )
        moved = move(batch, self.settings, self.bases.workspace)
        found = outcomes(batch, moved)
        results = []
        for i, (planned, layer) in enumerate(zip(plans, layers, strict=True)):
            method = planned.method(self.settings.method)
            report = LayerReport(
                module=planned.module,
                status="measured",
                reason=planned.reason,
                method=method,
                lora_rank=layer.rank,
                rank=in_target[i].svd.rank,
                source_tensor=planned.source_tensor,
                target_tensor=planned.target_tensor,
                source_shape=planned.source_shape,
                target_shape=planned.target_shape,
                is_validated=not planned.is_reshaped,
                source_basis=_facts(in_source[i]),
                target_basis=_facts(in_target[i]),
                similarity=_similarity(planned, in_source[i].svd, in_target[i].svd),
                drift=drifts[i],
                update_norm=lk.update_norm(*batch.factors[i]) * abs(layer.scale),
                outcomes=found[i],
                given_back=planned.given_back,
            )
            result = self._judge(report, planned, layer, moved[method][i])
            results.append(replace(result, basis=in_target[i].svd if self.keeps_bases else None))
        return results

    def _bases(
        self,
        plans: list[LayerPlan],
        sources: list[torch.Tensor],
        targets: list[torch.Tensor],
        drifts: list[float | None],
    ) -> tuple[list[Basis], list[Basis]]:
        """The source's and the target's basis of each layer."""
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
        return [in_source[i] for i in range(len(plans))], in_target

    def _judge(
        self, report: LayerReport, planned: LayerPlan, layer: LoraLayer, factors: Factors
    ) -> Result:
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
        moved = layer.with_factors(*factors, module=planned.target_module)
        return Result(replace(report, reason="; ".join(reasons)), moved)


def _firsts(adapter: Adapter, plan: Plan) -> dict[str, str]:
    """For a module that updates a weight as another one before it does, that one.

    The two ends of a tied model are such: worked out once, they stay the same to the last bit, as
    PEFT needs it to tie them.
    """
    seen: dict[tuple[str, str], LayerPlan] = {}
    firsts = {}
    for planned in plan.layers:
        first = seen.setdefault((planned.source_tensor, planned.target_tensor), planned)
        layers = adapter.layers[planned.module], adapter.layers[first.module]
        if first is not planned and layers[0].repeats(layers[1]):
            firsts[planned.module] = first.module
    return firsts


def _again(result: Result, planned: LayerPlan, layer: LoraLayer) -> Result:
    """A result under the name of another module."""
    moved = result.layer
    if moved is not None:
        moved = replace(moved, module=planned.target_module, is_embedding=layer.is_embedding)
    return replace(result, report=replace(result.report, module=planned.module), layer=moved)


def _live(layer: LoraLayer, planned: LayerPlan) -> LoraLayer:
    """The layer; where drift is added to an update with a scale of zero, with one that can be."""
    if layer.scale or not planned.given_back:
        return layer
    return layer.with_factors(0 * layer.matrix_B, layer.matrix_A, scale=1.0)


def _facts(basis: Basis) -> BasisFacts:
    svd = basis.svd
    return BasisFacts(svd.rank, float(svd.error), int(svd.passes), str(svd.path), basis.is_cached)


def _similarity(planned: LayerPlan, source: lk.SVD, target: lk.SVD) -> Similarity | None:
    if planned.is_reshaped:
        return None
    return Similarity(*lk.subspace_similarity(source, target))
