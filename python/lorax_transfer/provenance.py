# SPDX-License-Identifier: Apache-2.0
"""Where a transferred adapter comes from: facts for its tensor file, and its README.md."""

from .adapters.model_card import model_card
from .report import Report


def provenance(report: Report) -> dict[str, str]:
    """Facts for the metadata of the tensor file, by short name.

    Args:
        report: of the transfer.

    Returns:
        Method, cut, version, the three inputs with their content hashes, and the command line.
    """
    facts = {
        "method": report.settings["method"],
        "rank": report.settings["rank"],
        "energy": report.settings["energy"],
        "version": report.version,
        "adapter": report.adapter.location,
        "adapter_hash": report.adapter.content_hash,
        "source": report.source.location,
        "source_revision": report.source.revision,
        "source_hash": report.source.content_hash,
        "target": report.target.location,
        "target_revision": report.target.revision,
        "target_hash": report.target.content_hash,
        "command": report.command,
    }
    return {key: str(value) for key, value in facts.items() if value is not None}


def card(report: Report, cut: str, is_lorax: bool = False) -> str:
    """The README.md of the adapter that a transfer wrote.

    Args:
        report: of the transfer.
        cut: where the bases were cut, in words.
        is_lorax: whether the adapter is written as cores.

    Returns:
        Markdown.
    """
    return model_card(
        base_model=report.target.location,
        source_model=report.source.location,
        adapter=report.adapter.location,
        method=report.settings["method"],
        rank=None if report.settings["method"] == "copy" else cut.removeprefix("rank "),
        version=report.version,
        command=report.command,
        totals=_rows(report),
        dropped=report.dropped,
        dropped_kinds=report.dropped_kinds,
        tags=["lorax-transfer"],
        is_lorax=is_lorax,
    )


def _rows(report: Report) -> dict[str, object]:
    totals, method = report.totals, report.settings["method"]
    rows: dict[str, object] = {"Layers moved": f"{totals.transferred} of {totals.layers}"}
    if totals.energy_written is not None:
        rows["Energy of the update kept"] = f"{totals.energy_written:.1%}"
    for name, outcome in totals.methods.items():
        mark = " (used)" if name == method else ""
        rows[f"Energy kept by {name}{mark}"] = f"{outcome.energy_kept:.1%}"
    if totals.drift is not None:
        rows["Relative drift of the base weights, mean"] = f"{totals.drift:.2%}"
    if totals.embedding_drift is not None:
        rows["Relative drift of the embeddings"] = f"{totals.embedding_drift:.2%}"
    if totals.similarity is not None:
        rows["Similarity of the leading subspaces (chance)"] = (
            f"{totals.similarity:.3f} ({totals.chance:.3f})"
        )
    for module, each in report.given_back.items():
        if each.drift_undone is not None:
            rows[f"Drift undone of {module}"] = f"{each.drift_undone:.1%}"
    if report.updates_tied_embeddings:
        rows["To merge it"] = "untie embeddings and output layer of the base model first"
    if totals.unvalidated:
        rows["Layers that change shape, which no one has validated"] = totals.unvalidated
    return rows
