# SPDX-License-Identifier: Apache-2.0
"""Tables of the measurement between two sizes of one family."""

import json
import re
import statistics
from pathlib import Path

from .lm_report import _spread, metrics, score, select

BEGIN, END = "<!-- tables -->", "<!-- end of tables -->"
# The models' other end mark, after which decoding goes on, ends a line too.
LINE_END = re.compile(r"\n|<\|endoftext\|>")
BLEU = {"bleu": "BLEU", "line_bleu": "of first lines", "length_bleu": "at length"}


def first_line(answer):
    """What a reader takes who stops at the first line."""
    return LINE_END.split(answer, maxsplit=1)[0]


def at_length(answer, reference):
    """As many words as the reference has: how the answer begins, wherever it ends."""
    return " ".join(answer.split()[: len(reference.split())])


def scores(task, answers, references):
    """Scores of whole answers, of their first lines and of their beginnings."""
    lines = [first_line(answer) for answer in answers]
    begun = [at_length(a, r) for a, r in zip(answers, references, strict=True)]
    found = metrics(task, answers, references)
    for name, texts in (("line", lines), ("length", begun)):
        found |= {f"{name}_{k}": v for k, v in metrics(task, texts, references).items()}
    return found


def lift(rows, row, score="nll"):
    """Percent of the target's own adapters' lift that a row keeps."""
    none = select(rows, target=row["target"], method="none")[0][score]
    trained = [r[score] for r in select(rows, target=row["target"], method="trained")]
    return 100 * (none - row[score]) / (none - statistics.mean(trained))


def table(rows, source, target):
    """Every method from a source to a target, best first, between nothing and the ceiling."""
    moved = {}
    for row in rows:
        if row["target"] == target and row.get("source") == source:
            moved.setdefault(row["method"], []).append(row)
    order = sorted(moved, key=lambda m: statistics.mean(r["nll"] for r in moved[m]))
    ends = {m: select(rows, target=target, method=m) for m in ("none", "trained")}
    lines = [
        "| method | NLL | lift kept, % | NLL of words | lift kept, % | "
        + " | ".join([*BLEU.values(), "ms |"]),
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for method in ("none", *order, "trained"):
        found = ends.get(method) or moved[method]
        times = [r["transfer_ms"] for r in found if "transfer_ms" in r]
        cells = [f"*{method}*" if method in ends or "control" in method else method]
        for key in ("nll", "words_nll"):
            cells.append(_spread([r[key] for r in found], 3))
            kept = [] if method == "none" else [lift(rows, r, key) for r in found]
            cells.append(_spread(kept, 0))
        cells += [_spread([r[key] for r in found if key in r], 1) for key in BLEU]
        cells.append(f"{statistics.median(times):.0f}" if times else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(result):
    """Both directions."""
    rows, parts = result["rows"], []
    for source, target in (("small", "large"), ("large", "small")):
        if select(rows, source=source, target=target):
            parts += [f"### {source} to {target}", table(rows, source, target)]
    return "\n\n".join(parts)


def report(path, document=None, references=None):
    """Score the answers where their references are at hand, and write or print the tables."""
    if references is not None:
        score(path, json.loads(Path(references).read_text("utf-8")), scores)
    text = tables(json.loads(Path(path).read_text("utf-8")))
    if document is None:
        print(text)
        return
    content = Path(document).read_text("utf-8")
    if BEGIN not in content or END not in content:
        raise SystemExit(f"{document} needs the lines {BEGIN} and {END}; put them in.")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    Path(document).write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{after}", "utf-8")
