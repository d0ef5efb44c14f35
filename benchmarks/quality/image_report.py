# SPDX-License-Identifier: Apache-2.0
"""Tables, a plot and a contact sheet of what image_transfer.py measured.

    python benchmarks/quality/image_report.py DIRECTORY --images docs/images \
        --document docs/quality_images_tables.md

In the document the lines between `<!-- tables -->` and `<!-- end of tables -->` are replaced.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
KINDS = {"lora": "ordinary LoRA", "lorax": "LoRA-X, full core"}
ZOOM = 2
LABEL = 190
COLUMNS = 10
SCORES = ("loss", "style")  # whose lift is compared between targets
NOISE = 2  # points of lift: twice the standard error of a difference over the pictures
SMALLEST_GAP = 0.03  # of the trained adapter's lift: below that, shares of the gap are noise


def select(rows: Iterable[dict], **wanted: object) -> list[dict]:
    """Rows that have all of these values."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def spread(values: list[float], digits: int) -> str:
    """Mean and, from two values on, the standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def shares(
    rows: list[dict], pair: str, kind: str, method: str, score: str = "loss"
) -> dict[str, list[float]]:
    """For each seed: the share of the trained adapter's lift, and of the gap from copy to it."""
    found: dict[str, list[float]] = {"lift": [], "gap": []}
    for row in select(rows, pair=pair, kind=kind, method=method):
        none = select(rows, pair=pair, kind="none", seed=row["seed"])[0][score]
        trained = select(rows, pair=pair, kind=kind, method="trained", seed=row["seed"])[0][score]
        found["lift"].append(100 * (none - row[score]) / (none - trained))
        copy = select(rows, pair=pair, kind=kind, method="copy", seed=row["seed"])
        if copy:
            gap = copy[0][score] - trained
            if gap / (none - trained) > SMALLEST_GAP:
                found["gap"].append(100 * (copy[0][score] - row[score]) / gap)
    return found


def targets(result: dict) -> list[str]:
    """The targets that were measured, nearest first."""
    measured = {row["pair"] for row in result["rows"] if row["method"] == "trained"} - {"source"}
    return sorted(measured, key=result["drift"].__getitem__)


def methods(rows: list[dict], pair: str, kind: str) -> list[str]:
    """Methods that were measured, in the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in select(rows, pair=pair, kind=kind)))


def table(rows: list[dict], pair: str, kind: str) -> str:
    """Every method for one pair and kind, best first, between no adapter and the trained one."""
    named = methods(rows, pair, kind)
    moved = sorted(
        (m for m in named if m != "trained"),
        key=lambda m: statistics.mean(
            r["loss"] for r in select(rows, pair=pair, kind=kind, method=m)
        ),
    )
    lines = [
        "| method | loss x 1000 | lift kept, % | gap closed, % | style, % | content, % | KID | "
        "loss, new things | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in ["none", *moved, "trained"]:
        chosen = select(rows, pair=pair, kind="none" if method == "none" else kind, method=method)
        found = shares(rows, pair, kind, method)
        times = [row["transfer_ms"] for row in chosen if "transfer_ms" in row]
        cells = [
            method,
            spread([1000 * row["loss"] for row in chosen], 2),
            spread(found["lift"], 0) if found["lift"] else "",
            spread(found["gap"], 0) if found["gap"] and method not in ("copy", "trained") else "",
            spread([100 * row["style"] for row in chosen], 0),
            spread([100 * row["content"] for row in chosen], 0),
            spread([row["kid"] / 1000 for row in chosen], 1),
            spread([1000 * row["loss_new"] for row in chosen], 2),
            f"{statistics.median(times):.1f}" if times else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(result: dict) -> str:
    """All tables, as markdown."""
    rows = result["rows"]
    parts = []
    source = select(rows, pair="source")
    for kind, title in KINDS.items():
        own = [1000 * row["loss"] for row in select(source, kind=kind)]
        bare = [1000 * row["loss"] for row in select(source, kind="none")]
        parts.append(f"{title} on its own source: {spread(bare, 2)} without, {spread(own, 2)} with")
    lines = ["Loss x 1000. " + "; ".join(parts) + "."]
    for kind, title in KINDS.items():
        lines.append(f"### {title}: lift kept, %")
        lines.append(summary(result, kind))
    if "scan" in result:
        lines.append("### What `scan` advises")
        lines.append(advice(result))
    for pair in targets(result):
        for kind, title in KINDS.items():
            if select(rows, pair=pair, kind=kind):
                lines.append(f"### {pair}, drift {100 * result['drift'][pair]:.1f} %, {title}")
                lines.append(table(rows, pair, kind))
    return "\n\n".join(lines)


def summary(result: dict, kind: str) -> str:
    """Share of the trained adapter's lift that every method keeps on every target."""
    rows, pairs = result["rows"], targets(result)
    named = [m for m in methods(rows, pairs[-1], kind) if m != "trained"]
    columns = [(score, pair) for score in SCORES for pair in pairs]
    found = {
        m: [shares(rows, pair, kind, m, score)["lift"] for score, pair in columns] for m in named
    }
    # By the loss.
    named.sort(key=lambda m: -sum(map(statistics.mean, filter(None, found[m][: len(pairs)]))))
    heads = [f"{score}: {pair} ({100 * result['drift'][pair]:.1f} %)" for score, pair in columns]
    lines = ["| method | " + " | ".join(heads) + " |", "|---" * (1 + len(columns)) + "|"]
    for method in named:
        cells = [spread(values, 0) if values else "" for values in found[method]]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def advised(verdict: str, kind: str) -> str | None:
    """The measured method that the tool's word stands for, or None for "do not"."""
    project = "lorax core" if kind == "lorax" else "lorax 1/2"
    methods = {"copy": "copy", "project": project, "anchor": "anchor both"}
    # The tool's own strength falls with the drift; half is the nearest that was measured.
    return (methods | {"restore": "restore 16, half"}).get(verdict)


def advice(result: dict) -> str:
    """What the tool says of every pair, beside what was measured."""
    rows, right = result["rows"], 0
    lines = [
        "| target | adapter | advice | its method keeps, % | copy keeps, % | best method, % |",
        "|---" * 6 + "|",
    ]
    scanned = sorted(result["scan"], key=lambda r: (r["kind"], result["drift"][r["pair"]]))
    for row in scanned:
        found = {
            m: statistics.mean(shares(rows, row["pair"], row["kind"], m)["lift"])
            for m in methods(rows, row["pair"], row["kind"])
            if m != "trained" and "control" not in m
        }
        best = max(found, key=found.__getitem__)
        method = advised(row["verdict"], row["kind"])
        kept = 0.0 if method is None else found.get(method, 0.0)
        right += kept >= found[best] - NOISE
        lines.append(
            f"| {row['pair']} | {KINDS[row['kind']]} | {row['verdict']} | "
            f"{'' if method is None else f'{kept:.0f}'} | {found['copy']:.0f} | "
            f"{best}: {found[best]:.0f} |"
        )
    count = f"{right} of {len(scanned)} name the best method, or one within {NOISE} points of it."
    return "\n".join([*lines, "", count])


def plot(result: dict, path: Path) -> None:
    """Share of the lift that each method keeps, over the drift."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows, pairs = result["rows"], targets(result)
    figure, grid = pyplot.subplots(
        len(SCORES),
        len(KINDS),
        sharex=True,
        sharey=True,
        squeeze=False,
        figsize=(11, 7.5),
        layout="constrained",
    )
    drifts = [100 * result["drift"][pair] for pair in pairs]
    for axes, score in zip(grid, SCORES, strict=True):
        for axis, (kind, title) in zip(axes, KINDS.items(), strict=True):
            named = methods(rows, pairs[0], kind)
            for i, method in enumerate(m for m in named if m != "trained"):
                found = [shares(rows, pair, kind, method, score)["lift"] for pair in pairs]
                axis.errorbar(
                    drifts,
                    [statistics.mean(values) for values in found],
                    [statistics.stdev(v) if len(v) > 1 else 0 for v in found],
                    label=method,
                    marker="o",
                    capsize=2,
                    color=f"C{i}" if i < 10 else ("black", "navy")[i - 10],
                    linewidth=3 if method == "copy" else 1.2,
                    linestyle="--" if "control" in method else "-",
                )
            axis.axhline(100, color="black", linewidth=0.8, linestyle="--")
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_title(f"{title}: {score}")
            axis.set_xscale("log")
            axis.set_xticks(
                drifts, [f"{pair}: {d:.1f}" for pair, d in zip(pairs, drifts, strict=True)]
            )
            axis.set_xticks([], minor=True)
        axes[0].set_ylabel("share of the trained adapter's lift, %")
    for axis in grid[-1]:
        axis.set_xlabel("relative drift of the target's weights, %")
    for axis in grid[0]:
        axis.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def contact_sheet(result: dict, pictures: dict[str, np.ndarray], path: Path, pair: str) -> None:
    """Rows are methods, columns captions."""
    names = ["real noto", "real openmoji", "source none none", "source lora trained"]
    names += [f"{pair} none none"]
    for kind in KINDS:
        names += [f"{pair} {kind} {m}" for m in methods(result["rows"], pair, kind)]
    names = [name for name in names if name in pictures]
    side = pictures[names[0]].shape[1] * ZOOM
    count = min(COLUMNS, len(pictures[names[0]]))
    sheet = Image.new("RGB", (LABEL + count * side, len(names) * (side + 4)), "white")
    pen = ImageDraw.Draw(sheet)
    for i, name in enumerate(names):
        top = i * (side + 4)
        pen.text((4, top + side // 2 - 6), name, fill="black")
        for j, picture in enumerate(pictures[name][:count]):
            tile = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + j * side, top))
    sheet.quantize(256).save(path, optimize=True)


def write(document: Path, text: str) -> None:
    """Put the tables between the marks."""
    content = document.read_text()
    if BEGIN not in content or END not in content:
        raise SystemExit(f"{document} needs the lines {BEGIN} and {END}; put them in.")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    document.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}")


def main(argv: list[str] | None = None) -> None:
    """Write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="output of image_transfer.py run")
    parser.add_argument("--images", type=Path, required=True, help="where the pictures go")
    parser.add_argument("--document", type=Path, help="markdown whose tables are replaced")
    options = parser.parse_args(argv)
    result = json.loads((options.directory / "images.json").read_text())
    with np.load(options.directory / "pictures.npz") as data:
        pictures = dict(data)
    options.images.mkdir(parents=True, exist_ok=True)
    pairs = targets(result)
    plot(result, options.images / "quality_images.png")
    for pair in dict.fromkeys((pairs[0], pairs[-1])):
        contact_sheet(result, pictures, options.images / f"contact_sheet_{pair}.png", pair)
    text = tables(result)
    if options.document is None:
        print(text)
    else:
        write(options.document, text)


if __name__ == "__main__":
    main()
