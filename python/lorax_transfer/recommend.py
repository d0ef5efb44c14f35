# SPDX-License-Identifier: Apache-2.0
"""Which method, or none: a recommendation from what was measured of weights and update.

docs/quality.md says what the thresholds were set by, and how often they name the best method there
and on models that they were not set by.
"""

from .report import AlignmentFacts, Recommendation, Totals
from .settings import is_farther

# Relative drift below which two checkpoints count as one: what rounding to bfloat16 does.
MIN_DRIFT = 0.002

# Taking drift back was measured to win at 18 to 20 %, by the adapter that weighs the layers, where
# what stays outside of the adapted layers moved less than they did: on pictures.
MAX_DRIFT = 0.25

# Similarity that ProLoRA asks of a layer before it transfers it.
MIN_SIMILARITY = 0.8

# Share of chance-corrected overlap below which two models are taken as unrelated.
MIN_EXCESS = 0.2

# Projecting may cost at most a tenth of the update's energy, and has to keep it because the update
# lies in the subspace and not because the subspace is nearly everything.
MIN_KEPT = 0.9
MIN_KEPT_EXCESS = 0.5

# Mean likeness of the layers that two relatives of different depth share. At 0.8 a third
# of the gap between copying and an adapter of their own was closed; at 1.0, 83 and 90 % of such an
# adapter's lift were kept.
MIN_LIKENESS = 0.5


def recommend(totals: Totals, alignment: AlignmentFacts | None = None) -> Recommendation:
    """Say what to do with an adapter.

    Args:
        totals: what was measured.
        alignment: how models of different depth or width were brought together.

    Returns:
        The verdict and the sentence behind it.
    """
    drift, excess = totals.drift, totals.similarity_excess
    if (
        alignment is not None
        and alignment.source_layers != alignment.target_layers
        and alignment.likeness >= MIN_LIKENESS
        and not totals.unvalidated
    ):
        return Recommendation(
            "align",
            f"{alignment.paired} of the target's {alignment.target_layers} layers are close to "
            f"layers of the source (likeness {alignment.likeness:.2f}): use --method aligned, and "
            "expect a part of what an adapter of the target's own would reach",
        )
    if totals.unvalidated:
        return Recommendation(
            "do not",
            f"{totals.unvalidated} of {totals.layers} layers change shape, and no one has shown "
            "that a transfer between shapes carries what an adapter learned; train a new adapter, "
            "or score the result before you use it",
        )
    if excess is not None and excess < MIN_EXCESS:
        return Recommendation(
            "do not",
            f"the leading subspaces of the two models overlap hardly more than by chance "
            f"({totals.similarity:.2f} against {totals.chance:.2f}), so they are not related",
        )
    kept, chance = totals.in_subspace, totals.in_subspace_chance
    is_inside = False
    if kept is not None and chance is not None and chance < 1:
        is_inside = kept >= MIN_KEPT and (kept - chance) / (1 - chance) >= MIN_KEPT_EXCESS
    if drift is not None and drift <= MAX_DRIFT:
        return _related(drift, totals, kept, is_inside)
    if is_inside and (totals.similarity or 0) >= MIN_SIMILARITY:
        return Recommendation(
            "project",
            f"the update lies in the target's leading subspaces ({kept:.0%} of its energy), which "
            f"are similar to the source's ({totals.similarity:.2f}), though the base weights "
            "differ by much: use --method lorax, and score the result",
        )
    amount = "an unknown amount" if drift is None else f"{drift:.0%} on average"
    return Recommendation(
        "do not",
        f"the base weights differ by {amount}, beyond what copying is known to survive "
        f"({MAX_DRIFT:.0%}), and the update does not lie in the shared leading subspaces; train a "
        "new adapter, or score the result before you use it",
    )


def _related(drift: float, totals: Totals, kept: float | None, is_inside: bool) -> Recommendation:
    """Between relatives of one shape: take back what the adapter reaches, and embeddings with it.

    A layer that is the source's again fits to the rest of the model as far as the rest moved less.
    """
    embeddings, rest = totals.embedding_drift, totals.untouched_drift
    amount = f"the base weights differ by {drift:.2%} on average"
    if is_inside:
        aside = "; lorax would keep the adapter in cores and score as copying does"
    else:
        aside = "" if kept is None else f"; projecting would keep {kept:.0%} of the update"
    if max(drift, embeddings or 0.0) < MIN_DRIFT:
        return Recommendation(
            "copy", f"{amount}, no more than rounding makes: use --method copy{aside}"
        )
    if is_farther(rest, drift):
        return Recommendation(
            "anchor",
            f"{amount}, and those that the adapter is not on by {rest:.2%}, too much for layers "
            "that are the source's again: use --method anchor, which undoes drift only where the "
            f"adapter reads and writes{aside}",
        )
    price = (
        "score the target's own skill beside the adapter's task, because the target's training is "
        "what is taken back"
    )
    if is_farther(embeddings, drift):
        return Recommendation(
            "restore",
            f"{amount}, the embeddings by {embeddings:.2%}: use --method restore with --embeddings "
            f"1, and {price}; where that costs too much, use copy with --embeddings 0.5{aside}",
        )
    return Recommendation(
        "restore",
        f"{amount}: use --method restore, and {price}; where that costs too much, use "
        f"anchor{aside}",
    )
