# SPDX-License-Identifier: Apache-2.0
"""The report as a picture: what each layer keeps, how alike its subspaces are, how far it moved."""

from pathlib import Path
from typing import Any

from .errors import OutputError
from .report import LayerReport, Report

try:
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
except ImportError as _error:
    raise OutputError(
        'Drawing a plot needs matplotlib: pip install "lorax-kernels[transfer]".'
    ) from _error

# Hollow where methods often coincide, so that one does not hide the other.
_STYLES: dict[str, dict[str, Any]] = {
    "copy": {"marker": "_", "color": "#8a8a8a", "markersize": 8, "markeredgewidth": 1.5},
    "prolora": {"marker": "s", "color": "#d55e00", "markersize": 7, "markerfacecolor": "none"},
    "lorax": {"marker": "o", "color": "#0072b2", "markersize": 4},
    "transport": {"marker": "D", "color": "#009e73", "markersize": 6, "markerfacecolor": "none"},
    "anchor": {"marker": "^", "color": "#cc79a7", "markersize": 6, "markerfacecolor": "none"},
    "restore": {"marker": "v", "color": "#e69f00", "markersize": 6, "markerfacecolor": "none"},
}


def draw(report: Report, path: Path) -> None:
    """Draw a report into a PNG file.

    Args:
        report: what to draw.
        path: the file; its name does not matter.

    Raises:
        OutputError: the report measured nothing, as that of a dry run.
    """
    layers = [layer for layer in report.layers if layer.is_measured]
    if not layers:
        raise OutputError("a dry run measures nothing that a plot could show; leave --plot out.")
    width = min(24.0, max(8.0, 2.5 + 0.16 * len(layers)))
    figure = Figure(figsize=(width, 9.5), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 1, sharex=True, height_ratios=(3, 3, 2))
    figure.suptitle(_title(report), fontsize=11, fontweight="bold", x=0.01, ha="left")
    _draw_kept(axes[0], layers)
    _draw_similarity(axes[1], layers, report.settings["min_similarity"])
    _draw_drift(axes[2], layers)
    prefix_free = _short_names(layers)
    step = -(-len(layers) // 90)
    ticks = list(range(0, len(layers), step))
    axes[2].set_xticks(ticks, [prefix_free[i] for i in ticks], rotation=90, fontsize=7)
    axes[2].set_xlim(-0.7, len(layers) - 0.3)
    figure.savefig(path, format="png")


def _title(report: Report) -> str:
    names = [Path(model.location).name for model in (report.adapter, report.source, report.target)]
    verdict = f" - recommendation: {report.recommendation.verdict}" if report.recommendation else ""
    return f"{names[0]}: from {names[1]} to {names[2]}{verdict}"


def _draw_kept(axes: Axes, layers: list[LayerReport]) -> None:
    for method, style in _STYLES.items():
        points = [
            (i, 100 * x.outcomes[method].energy_kept)
            for i, x in enumerate(layers)
            if method in x.outcomes
        ]
        if points:
            axes.plot(
                [i for i, _ in points], [y for _, y in points], linestyle="", label=method, **style
            )
    axes.set_ylabel("energy kept, %")
    axes.set_ylim(0, max(105, axes.get_ylim()[1]))
    _finish(axes)


def _draw_similarity(axes: Axes, layers: list[LayerReport], limit: float | None) -> None:
    known = [(i, x.similarity) for i, x in enumerate(layers) if x.similarity is not None]
    at = [i for i, _ in known]
    if known:
        axes.plot(at, [s.U for _, s in known], "^", color="#0072b2", label="U", markersize=4.5)
        axes.plot(at, [s.V for _, s in known], "v", color="#009e73", label="V", markersize=4.5)
        for side, colour in (("U", "#0072b2"), ("V", "#009e73")):
            chance = [getattr(s, f"chance_{side}") for _, s in known]
            axes.plot(
                at, chance, "_", color=colour, alpha=0.6, markersize=7, label=f"{side} by chance"
            )
    else:
        axes.text(0.5, 0.5, "not defined between shapes", transform=axes.transAxes, ha="center")
    if limit is not None:
        axes.axhline(limit, color="#d55e00", linewidth=1, label=f"asked for: {limit:g}")
    axes.set_ylabel("similarity of the bases")
    axes.set_ylim(0, 1.05)
    _finish(axes)


def _draw_drift(axes: Axes, layers: list[LayerReport]) -> None:
    drifts = [(i, 100 * x.drift) for i, x in enumerate(layers) if x.drift is not None]
    if drifts:
        axes.bar([i for i, _ in drifts], [d for _, d in drifts], width=0.7, color="#56606b")
    else:
        axes.text(0.5, 0.5, "not defined between shapes", transform=axes.transAxes, ha="center")
    axes.set_ylabel("drift of the weight, %")
    _finish(axes)


def _finish(axes: Axes) -> None:
    axes.grid(axis="y", color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False, fontsize=8, borderpad=0
        )


def _short_names(layers: list[LayerReport]) -> list[str]:
    """Module paths without the components that all of them share."""
    split = [layer.module.split(".") for layer in layers]
    shortest = min(len(parts) for parts in split)
    shared = 0
    while shared < shortest - 1 and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]
