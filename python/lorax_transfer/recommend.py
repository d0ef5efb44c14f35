# SPDX-License-Identifier: Apache-2.0
"""Copy, project, or do not: a recommendation from what was measured.

The thresholds are reasoned, not fitted. What they rest on: an ordinary LoRA is hardly aligned with
its base's leading subspaces, so that projecting it loses what it learned, while copying between
checkpoints that drifted by about one per cent kept most of it; at seven per cent nothing helped.
Nobody has mapped the ground between. docs/report.md says the same at length.
"""

from .report import AlignmentFacts, Recommendation, Totals

# Relative drift of the base weights up to which an update still meets the weights it was made for.
MAX_DRIFT = 0.05

# Similarity that ProLoRA asks of a layer before it transfers it.
MIN_SIMILARITY = 0.8

# Share of chance-corrected overlap below which two models are taken as unrelated.
MIN_EXCESS = 0.2

# Projecting may cost at most a tenth of the update's energy, and has to keep it because the update
# lies in the subspace and not because the subspace is nearly everything.
MIN_KEPT = 0.9
MIN_KEPT_EXCESS = 0.5

# Mean likeness of the layers that two relatives of different depth share. Measured at 0.8, where
# two thirds of the gap to an adapter of their own stayed open and a third was closed.
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
    if kept is not None and chance is not None and chance < 1:
        is_aligned = kept >= MIN_KEPT and (kept - chance) / (1 - chance) >= MIN_KEPT_EXCESS
        if is_aligned and (totals.similarity or 0) >= MIN_SIMILARITY:
            return Recommendation(
                "project",
                f"the update lies in the target's leading subspaces ({kept:.0%} of its energy), "
                f"which are similar to the source's ({totals.similarity:.2f}): use --method lorax",
            )
    if drift is not None and drift <= MAX_DRIFT:
        loss = "" if kept is None else f", while projecting would keep {kept:.0%} of the update"
        return Recommendation(
            "copy",
            f"the base weights differ by only {drift:.2%} on average{loss}: use --method copy",
        )
    amount = "an unknown amount" if drift is None else f"{drift:.0%} on average"
    return Recommendation(
        "do not",
        f"the base weights differ by {amount}, beyond what copying is known to survive "
        f"({MAX_DRIFT:.0%}), and the update does not lie in the shared leading subspaces; train a "
        "new adapter, or score the result before you use it",
    )
