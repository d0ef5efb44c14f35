# SPDX-License-Identifier: Apache-2.0
"""The report for people: a table of layers, the methods side by side, and what to do."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .report import LayerReport, Report
from .settings import DEFAULT_RANK

# Below this width, and a little more beside notes, the columns that explain least are left out.
_WIDE = 100
_STYLES = dict.fromkeys(("copy", "restore", "anchor", "project", "align"), "bold green")
_STYLES["do not"] = "bold red"


def show(report: Report, console: Console) -> None:
    """Print a report.

    Args:
        report: what to print.
        console: where to; its width decides which columns there is room for.
    """
    # Not wrapped, so that a path can be copied in one piece.
    console.print(_heading(report), soft_wrap=True, highlight=False)
    console.print(_layers(report, console.width))
    for line in _excluded(report.layers):
        console.print(line, style="dim")
    if report.kind == "plan":
        console.print(f"\nNothing was read or written yet. {_memory(report)}", highlight=False)
        return
    console.print(_methods(report))
    for text in _conclusion(report):
        console.print(text, highlight=False)


def _heading(report: Report) -> Text:
    text = Text()
    for label, model in (
        ("adapter", report.adapter),
        ("source", report.source),
        ("target", report.target),
    ):
        rule = "" if model.rule in ("", "exact") else f"  (names: {model.rule})"
        text.append(f"{label:>8}  ", style="dim").append(model.location)
        text.append(f"{rule}\n", style="dim")
    text.append("  method  ", style="dim").append(report.settings["method"])
    text.append(f", bases of {_cut(report)}\n", style="dim")
    if report.dropped_kinds:
        text.append(" dropped  ", style="dim")
        text.append(f"{', '.join(report.dropped_kinds)} ({len(report.dropped)} tensors)\n")
    return text


def _cut(report: Report) -> str:
    rank, energy = report.settings["rank"], report.settings["energy"]
    if energy is not None:
        return f"energy {energy:g}" + ("" if rank is None else f", at most rank {rank}")
    if rank is not None:
        return f"rank {rank}"
    return f"rank {DEFAULT_RANK}, less where a layer is smaller"


def _layers(report: Report, width: int) -> Table:
    layers = [layer for layer in report.layers if layer.status != "excluded"]
    prefix = common_prefix([layer.module for layer in layers])
    is_plan = report.kind == "plan"
    longest = min(32, max(len(layer.module) - len(prefix) for layer in layers))
    has_notes = any(_note(layer, report) for layer in layers)
    is_wide = width >= _WIDE + (30 if has_notes else 0)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.add_column(f"{prefix}*" if prefix else "module", overflow="fold", min_width=longest)
    headings = ["weight"] if is_wide or is_plan else []
    headings += ["r", "k"]
    if not is_plan:
        headings += ["drift", "sim U/V", "chance"] if is_wide else ["drift", "sim U/V"]
        headings += ["kept", "norm", "svd err"] if is_wide else ["kept"]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    if has_notes:
        table.add_column("note", overflow="fold", ratio=1)
    for layer in layers:
        cells = _cells(layer)
        row = [layer.module.removeprefix(prefix), *(cells[heading] for heading in headings)]
        style = "dim" if layer.status == "left out" else None
        table.add_row(*row, *([_note(layer, report)] if has_notes else []), style=style)
    return table


def _cells(layer: LayerReport) -> dict[str, str]:
    similarity, outcome = layer.similarity, layer.outcome
    cells = {"weight": _shape(layer), "r": str(layer.lora_rank), "k": str(layer.rank)}
    if layer.drift is not None:
        cells["drift"] = f"{layer.drift:.2%}"
    if similarity is not None:
        cells["sim U/V"] = f"{similarity.U:.3f}/{similarity.V:.3f}"
        cells["chance"] = f"{similarity.chance_U:.2f}/{similarity.chance_V:.2f}"
    if outcome is not None:
        cells["kept"] = f"{outcome.energy_kept:.1%}"
        cells["norm"] = f"{outcome.norm_ratio:.2f}"
    if layer.svd_error is not None:
        cells["svd err"] = f"{layer.svd_error:.0e}"
    return defaultdict(lambda: "-", cells)


def _excluded(layers: Sequence[LayerReport]) -> list[str]:
    """A line for each reason instead of a row for each module."""
    reasons = Counter(layer.reason for layer in layers if layer.status == "excluded")
    return [
        f"{count} module{'' if count == 1 else 's'} excluded: {reason}"
        for reason, count in reasons.items()
    ]


def _note(layer: LayerReport, report: Report) -> str:
    usual = {"transfer": "transferred", "scan": "measured", "plan": "planned"}[report.kind]
    parts = [] if layer.status == usual else [layer.status]
    return ": ".join([*parts, layer.reason] if layer.reason else parts)


def _shape(layer: LayerReport) -> str:
    if layer.target_shape is None or layer.source_shape is None:
        return "-"
    shapes = [layer.source_shape, layer.target_shape]
    texts = [f"{m}x{n}" for m, n in shapes]
    return texts[1] if texts[0] == texts[1] else " to ".join(texts)


def common_prefix(modules: Sequence[str]) -> str:
    """Leading components that all module paths share, kept out of every row."""
    split = [module.split(".")[:-1] for module in modules]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return "".join(f"{part}." for part in shared) if len(modules) > 1 else ""


def _methods(report: Report) -> Table:
    """Direct copy beside the other methods, over all measured layers."""
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    table.title, table.title_justify = "\nAll layers, weighted by the energy of the update", "left"
    table.title_style = "bold"
    for heading in ("method", "rank", "energy", "norm", "change from copy", "drift undone"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, outcome in report.totals.methods.items():
        is_chosen = name == report.settings["method"] and report.kind == "transfer"
        table.add_row(
            name + (" (written)" if is_chosen and report.output else ""),
            str(outcome.rank),
            f"{outcome.energy_kept:.1%}",
            f"{outcome.norm_ratio:.3f}",
            "-" if outcome.change is None else f"{outcome.change:.3f}",
            "-" if outcome.drift_undone is None else f"{outcome.drift_undone:.1%}",
            style="bold" if is_chosen else None,
        )
    return table


def _conclusion(report: Report) -> list[Text]:
    totals, lines = report.totals, []
    facts = []
    if totals.drift is not None:
        facts.append(f"drift of the weights {totals.drift:.2%} (at most {totals.drift_max:.2%})")
    if totals.embedding_drift is not None:
        facts.append(f"of the embeddings {totals.embedding_drift:.2%}")
    if totals.untouched_drift is not None:
        facts.append(f"of all other weights {totals.untouched_drift:.2%}")
    if totals.similarity is not None:
        facts.append(f"similarity {totals.similarity:.3f} (chance {totals.chance:.3f})")
    if totals.in_subspace is not None and totals.in_subspace_chance is not None:
        facts.append(
            f"{totals.in_subspace:.1%} of the update in the target's subspaces (a random one: "
            f"{totals.in_subspace_chance:.1%})"
        )
    if report.alignment is not None:
        found = report.alignment
        facts.append(
            f"{found.paired} pairs of {found.source_layers} and {found.target_layers} layers, "
            f"likeness {found.likeness:.2f}, stream by {found.stream}"
        )
    if facts:
        lines.append(Text("\n" + ", ".join(facts)))
    lines += [
        Text(f"{module}: {each.drift_undone:.1%} of the drift undone as well, rank {each.rank}")
        for module, each in report.given_back.items()
        if each.drift_undone is not None
    ]
    if report.recommendation is not None:
        verdict, reason = report.recommendation.verdict, report.recommendation.reason
        text = Text("\nRecommendation: ").append(verdict, style=_STYLES[verdict])
        lines.append(text.append(f". {reason[0].upper()}{reason[1:]}."))
    if report.output is not None:
        counts = f"{totals.transferred} of {totals.layers} layers"
        lines.append(Text(f"\nWrote {counts} to {report.output} in {report.seconds:.1f} s."))
    return lines


def _memory(report: Report) -> str:
    size = report.memory_bytes / 2**20
    amount = f"{size:.0f} MiB" if size < 10240 else f"{size / 1024:.1f} GiB"
    return f"The run will take about {amount} of memory beside the libraries."


def show_info(facts: Mapping[str, Any], console: Console) -> None:
    """Print what an installation can do.

    Args:
        facts: as `lorax_transfer.info.info` gathers them.
        console: where to.
    """
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for name, value in facts["versions"].items():
        grid.add_row(name, str(value or "none"))
    for device in facts["device"]:
        grid.add_row("device", device)
    backends = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("backend", "", "why"):
        backends.add_column(heading)
    for row in facts["backends"]:
        mark = Text("yes", style="green") if row["available"] else Text("no", style="red")
        backends.add_row(row["name"], mark, row["reason"])
        if row["available"]:
            backends.add_row("", "", Text(f"ops: {', '.join(row['ops'])}", style="dim"))
    packages = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in ("package", "version", "needed for"):
        packages.add_column(heading)
    for row in facts["packages"]:
        packages.add_row(row["name"], row["version"] or Text("-", style="red"), row["needed_for"])
    console.print(Group(grid, Text(), backends, Text(), packages))
