# SPDX-License-Identifier: Apache-2.0
"""What a run found and did, as plain data; docs/report.md describes the JSON."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

SCHEMA = "lorax-transfer-report/1"

# What can have happened to a layer.
STATUSES = ("planned", "measured", "transferred", "left out", "excluded")


@dataclass(frozen=True)
class Outcome:
    """What one method does to an update `dW`, with `dW_t` its result.

    Attributes:
        energy_kept: `||dW_t||^2 / ||dW||^2`.
        norm_ratio: `||dW_t|| / ||dW||`.
        change: `||dW_t - dW|| / ||dW||`, how far the result is from direct copy; None where shapes
            differ.
        rank: rank of the result as it is written; in totals the largest.
        drift_undone: `-<dW_t - dW, D> / ||D||^2` with the drift `D = W_t - W_s`: the share of the
            target's own training that the result takes back; about 0 for a method that knows
            nothing of it. None where there is no drift or shapes differ.
    """

    energy_kept: float
    norm_ratio: float
    change: float | None
    rank: int
    drift_undone: float | None = None


@dataclass(frozen=True)
class BasisFacts:
    """How one truncated basis was found.

    Attributes:
        rank: singular directions kept.
        error: estimated relative projector error.
        passes: thin products with the weight.
        path: "randomized" or "exact".
        is_cached: whether it came from the cache.
    """

    rank: int
    error: float
    passes: int
    path: str
    is_cached: bool


@dataclass(frozen=True)
class Similarity:
    """How much the two leading subspaces of a layer overlap, and how much they would by chance.

    Attributes:
        U: `||U_s^T U_t||^2 / k`, 1 for equal subspaces.
        V: the same for the right singular vectors.
        chance_U: what unrelated subspaces score, `k / out`.
        chance_V: `k / in`.
    """

    U: float
    V: float
    chance_U: float
    chance_V: float

    @property
    def smaller(self) -> float:
        """The smaller one of the two, which `min_similarity` is compared with."""
        return min(self.U, self.V)

    @property
    def excess(self) -> float | None:
        """The smaller excess over chance: 0 at chance, 1 for equal subspaces.

        None where the bases span a whole side on both sides, so that nothing can be told.
        """
        pairs = ((self.U, self.chance_U), (self.V, self.chance_V))
        told = [(phi - chance) / (1 - chance) for phi, chance in pairs if chance < 1]
        return min(told) if told else None


@dataclass(frozen=True)
class LayerReport:
    """One module of the adapter. None stands for what was not measured or is not defined.

    Attributes:
        module: its path in the adapter.
        status: one of `STATUSES`.
        reason: why, where it is not the plain case; empty otherwise.
        method: the method asked for.
        lora_rank: rank of the update.
        rank: singular directions kept.
        source_tensor: weight in the source.
        target_tensor: weight in the target.
        source_shape: the source's weight as a matrix `(out, in)`.
        target_shape: the target's.
        is_validated: False where shapes differ.
        source_basis: how the source's basis was found.
        target_basis: how the target's was.
        similarity: overlap of the two.
        drift: `||W_t - W_s|| / ||W_s||` of the base weights.
        update_norm: `||dW||`, scale included.
        outcomes: what each method that is defined for the layer does to the update. Empty where the
            update is zero.
        given_back: share of its drift that was undone because it is an embedding table or an output
            layer, and these were to be given back; its method is "restore" then.
    """

    module: str
    status: str
    reason: str
    method: str
    lora_rank: int
    rank: int | None = None
    source_tensor: str | None = None
    target_tensor: str | None = None
    source_shape: tuple[int, int] | None = None
    target_shape: tuple[int, int] | None = None
    is_validated: bool = True
    source_basis: BasisFacts | None = None
    target_basis: BasisFacts | None = None
    similarity: Similarity | None = None
    drift: float | None = None
    update_norm: float | None = None
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)
    given_back: float = 0.0

    @property
    def outcome(self) -> Outcome | None:
        """What the method asked for does to the update."""
        return self.outcomes.get(self.method)

    @property
    def svd_error(self) -> float | None:
        """The larger error of the two bases."""
        bases = (self.source_basis, self.target_basis)
        return max((basis.error for basis in bases if basis is not None), default=None)

    @property
    def is_measured(self) -> bool:
        """Whether weights were compared."""
        return self.target_basis is not None


@dataclass(frozen=True)
class EmbeddingReport:
    """An embedding table or output layer that the adapter is not on.

    Attributes:
        module: its path, as the adapter names modules.
        source_tensor: weight in the source.
        target_tensor: weight in the target; that of the embeddings for a tied output layer.
        source_shape: the source's weight.
        target_shape: the target's.
        is_output: whether it is an output layer.
        drift: `||W_t - W_s|| / ||W_s||`; None where it is not defined.
        rank: rank of the update that gives a part of it back; None where there is none.
        drift_undone: share of the target's own training of it that this update takes back.
    """

    module: str
    source_tensor: str
    target_tensor: str
    source_shape: tuple[int, ...]
    target_shape: tuple[int, ...]
    is_output: bool = False
    drift: float | None = None
    rank: int | None = None
    drift_undone: float | None = None


@dataclass(frozen=True)
class Model:
    """Where something was read from.

    Attributes:
        location: path or hub id.
        revision: commit of a hub snapshot, or None.
        format: "safetensors", "gguf" or "peft".
        content_hash: hash of the files; None for a base model that was not hashed (in a scan or a
            dry run).
        rule: how the adapter's modules were found in it; empty for the adapter itself.
    """

    location: str
    revision: str | None
    format: str
    content_hash: str | None
    rule: str


@dataclass(frozen=True)
class Totals:
    """The layers together; means are weighted by the energy of each layer's update.

    Attributes:
        layers: modules of the adapter.
        transferred: of these, the written ones.
        left_out: those below `min_similarity`.
        excluded: those that the user excluded.
        unvalidated: those whose shapes differ.
        above_tolerance: those with a basis that missed its tolerance.
        energy_written: energy of the written update, over that of the whole adapter.
        drift: mean drift, of layers other than embeddings and output layers if there are any.
        drift_max: the largest of these.
        embedding_drift: largest drift of an embedding table or output layer.
        untouched_drift: drift of all other weights that the adapter is not on, taken together.
        similarity: mean of the smaller one of U and V.
        chance: mean of its chance level.
        similarity_excess: mean excess over chance, 1 for equal subspaces.
        in_subspace: share of the update inside the target's bases: what "lorax" keeps.
        in_subspace_chance: that share for a random update.
        methods: what each method does to the measured layers together.
    """

    layers: int
    transferred: int
    left_out: int
    excluded: int
    unvalidated: int
    above_tolerance: int
    energy_written: float | None
    drift: float | None
    drift_max: float | None
    similarity: float | None
    chance: float | None
    similarity_excess: float | None
    in_subspace: float | None
    in_subspace_chance: float | None
    methods: dict[str, Outcome]
    embedding_drift: float | None = None
    untouched_drift: float | None = None


@dataclass(frozen=True)
class Recommendation:
    """What to do with the adapter.

    Attributes:
        verdict: "copy", "restore", "anchor", "project" (by method "lorax"), "align" (by method
            "aligned") or "do not".
        reason: the sentence behind it.
    """

    verdict: str
    reason: str


@dataclass(frozen=True)
class AlignmentFacts:
    """How two models were brought together for method "aligned".

    Attributes:
        stream: "identity", where they share the coordinates of their residual streams, or
            "procrustes".
        source_layers: layers of the source.
        target_layers: layers of the target.
        paired: those that were paired up.
        likeness: mean likeness of the pairs: 1 for equal weights, about 0 for unrelated ones.
    """

    stream: str
    source_layers: int
    target_layers: int
    paired: int
    likeness: float


@dataclass(frozen=True)
class Report:
    """Everything that a run found and did.

    Attributes:
        kind: "transfer", "scan" or "plan" (a dry run).
        version: version of this package.
        command: the command line, or None.
        adapter: the adapter.
        source: the base model that it was trained on.
        target: the base model that it was moved to.
        settings: the options of the run.
        dropped: tensors of the adapter that were dropped on request.
        dropped_kinds: their kinds.
        layers: a report for each module of the adapter, in its order.
        totals: the layers together.
        embeddings: what the models have of embeddings and output layers that the adapter is not on;
            empty where the models differ in shape, and for a plan.
        alignment: how the models were brought together; None but for method "aligned".
        recommendation: what to do; None for a plan, which measured nothing.
        warnings: sentences that the user should not miss.
        memory_bytes: the plan's estimate of the memory needed.
        seconds: duration of the run.
        output: directory that was written, or None.
    """

    kind: str
    version: str
    command: str | None
    adapter: Model
    source: Model
    target: Model
    settings: dict[str, Any]
    dropped: tuple[str, ...]
    dropped_kinds: tuple[str, ...]
    layers: tuple[LayerReport, ...]
    totals: Totals
    embeddings: tuple[EmbeddingReport, ...]
    alignment: AlignmentFacts | None
    recommendation: Recommendation | None
    warnings: tuple[str, ...]
    memory_bytes: int
    seconds: float
    output: str | None

    @property
    def given_back(self) -> dict[str, Outcome | EmbeddingReport]:
        """What `--embeddings` did to each module, where the adapter was on it and where not."""
        inside = {x.module: x.outcome for x in self.layers if x.given_back and x.outcome}
        outside = {x.module: x for x in self.embeddings if x.drift_undone is not None}
        return {**inside, **outside}

    @property
    def updates_tied_embeddings(self) -> bool:
        """Whether the adapter updates embeddings and an output layer that is tied to them."""
        # No other two modules stand for one tensor.
        updated = [
            *(x.target_tensor for x in self.embeddings if x.drift_undone is not None),
            *(x.target_tensor for x in self.layers if x.status == "transferred"),
        ]
        return len(set(updated)) < len(updated)

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready data, in the schema of docs/report.md."""
        return {"schema": SCHEMA, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """The report as JSON text that ends with a newline."""
        return json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n"
