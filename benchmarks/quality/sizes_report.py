# SPDX-License-Identifier: Apache-2.0
"""Tables of the measurement between two sizes of one family."""

import json
import statistics
from pathlib import Path

from .lm_report import _spread, score, select

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"


def lift(rows, row, score="nll"):
    """Percent of the target's own adapters' lift that a row keeps."""
    none = select(rows, target=row["target"], method="none")[0][score]
    trained = [r[score] for r in select(rows, target=row["target"], method="trained")]
    return 100 * (none - row[score]) / (none - statistics.mean(trained))


def table(rows, source, target, bleu="BLEU"):
    """Every method from a source to a target, best first, between nothing and the ceiling."""
    moved = {}
    for row in rows:
        if row["target"] == target and row.get("source") == source:
            moved.setdefault(row["method"], []).append(row)
    order = sorted(moved, key=lambda m: statistics.mean(r["nll"] for r in moved[m]))
    ends = {m: select(rows, target=target, method=m) for m in ("none", "trained")}
    lines = [
        f"| method | NLL | lift kept, % | NLL of words | lift kept, % | {bleu} | ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for method in ("none", *order, "trained"):
        found = ends.get(method) or moved[method]
        times = [r["transfer_ms"] for r in found if "transfer_ms" in r]
        cells = [f"*{method}*" if method in ends or "control" in method else method]
        for key in ("nll", "words_nll"):
            cells.append(_spread([r[key] for r in found], 3))
            kept = [] if method == "none" else [lift(rows, r, key) for r in found]
            cells.append(_spread(kept, 0))
        cells.append(_spread([r["bleu"] for r in found if "bleu" in r], 1))
        cells.append(f"{statistics.median(times):.0f}" if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(result):
    """Both directions."""
    rows, bleu, parts = result["rows"], "BLEU", []
    if "answers_end_at" in result:
        bleu += f", first {result['answers_end_at']} tokens"
    for source, target in (("small", "large"), ("large", "small")):
        if select(rows, source=source, target=target):
            parts += [f"### {source} to {target}", table(rows, source, target, bleu)]
    return "\n\n".join(parts)


def report(path, document=None, references=None):
    """Score the answers where their references are at hand, and write or print the tables."""
    if references is not None:
        score(path, json.loads(Path(references).read_text("utf-8")))
    text = tables(json.loads(Path(path).read_text("utf-8")))
    if document is None:
        print(text)
        return
    content = Path(document).read_text("utf-8")
    if BEGIN not in content or END not in content:
        raise SystemExit(f"{document} needs the lines {BEGIN} and {END}; put them in.")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    Path(document).write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")
