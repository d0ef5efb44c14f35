# SPDX-License-Identifier: Apache-2.0
"""How often `lorax-transfer scan` names the best method of what was measured."""

import json
import re
import statistics
from dataclasses import fields
from pathlib import Path

from lorax_transfer.recommend import recommend
from lorax_transfer.report import AlignmentFacts, Totals
from lorax_transfer.settings import restored_share

from .lm_report import KINDS, TASKS, cases, put

# The rows that `lorax-transfer --method NAME` stands for: the first that was measured.
SETTINGS = {
    "copy": ("copy",),
    "lorax": ("lorax core", "lorax k=320", "lorax k=64"),
    "prolora": ("prolora k=320", "prolora k=64"),
    "transport": ("transport k=320", "transport k=64"),
    "anchor": ("anchor both", "anchor output"),
    "aligned": ("aligned",),
    "restore": ("restore",),
    "restore --embeddings 1": ("restore --embeddings 1", "restore q=16 with embeddings"),
}
# A strength that the user would have to choose; `scan` says none.
BY_HAND = (
    "restore q=16",
    "restore q=16 w=0.5",
    "restore q=16 by drift",
    "restore q=16 with embeddings",
    "restore q=16 w=0.5 with embeddings",
    "restore by drift + embeddings q=16",
    "anchor + restore by drift",
)


def _totals(facts, case):
    """What `scan` would read of the case, for the first seed."""
    empty = dict.fromkeys(f.name for f in fields(Totals))
    empty |= dict.fromkeys(
        ("layers", "transferred", "left_out", "excluded", "unvalidated", "above_tolerance"), 0
    )
    about = facts.get(case.target, {})
    # Files of before `scan` looked at embeddings have their drift beside.
    empty["embedding_drift"] = about.get("embeddings", {}).get("drift")
    scans = about.get("scan", {}).get(f"{case.kind} {case.task}", {})
    return [Totals(**(empty | scan | {"methods": {}})) for scan in scans.values()]


def _alignment(facts, case):
    other = case.target if case.source == "source" else case.source
    about = facts.get(other, {})
    if "matched" not in about:
        return None
    counts = len(about["matched"]), about["source_layers"]
    target, source = counts if case.source == "source" else counts[::-1]
    paired = sum(i is not None for i in about["matched"])
    stream = "procrustes" if "hidden" in about else "identity"
    return AlignmentFacts(stream, source, target, paired, about["likeness"])


def verdict(facts, case):
    """The method that `lorax_transfer.recommend` names, as it was measured; None for "do not"."""
    alignment = _alignment(facts, case)
    found = _totals(facts, case)
    if alignment is not None:
        narrow = alignment.stream == "procrustes"
        empty = dict.fromkeys(f.name for f in fields(Totals))
        empty |= {"layers": 1, "unvalidated": int(narrow), "methods": {}}
        found = [Totals(**empty)]
    if not found:
        return None
    name = re.search(
        r"--method (\w+)(?: with (--embeddings 1))?", recommend(found[0], alignment).reason
    )
    wanted = SETTINGS.get(" ".join(filter(None, name.groups())), ()) if name else ()
    if name and name[1] == "restore" and wanted[0] not in case.methods:
        # Measured before the tool had this default.
        share = restored_share(found[0].drift)
        wanted = (*wanted, "restore q=16" if share > 0.75 else "restore q=16 w=0.5")
    return next((m for m in wanted if m in case.methods), None)


def check_scan(facts, case):
    """What `scan` says of a case, and what was best at its own strength and at any."""
    said = verdict(facts, case)
    named = case.candidates()
    # In files of before there were defaults, a strength by hand stands for one.
    at_default = [m for m in named if m not in BY_HAND or "restore" not in case.methods]
    best, best_at_any = (min(names, key=case.mean) for names in (at_default, named))
    return {
        "case": f"{TASKS[case.task][0]}, {KINDS[case.kind]}, {case.source} to {case.target}",
        "said": said,
        "best": best,
        "is right": case.is_lost() if said is None else case.is_level(said, best),
        "best at any": best_at_any,
        "is right at any": case.is_lost() if said is None else case.is_level(said, best_at_any),
        "behind": None if said is None else case.mean(said) - case.mean(best_at_any),
        "price": _price(case, said, best_at_any),
    }


def _price(case, *methods):
    """What methods cost the target's own text beyond an adapter trained on the target."""
    if "copy" not in case.methods or None in methods:
        return None
    ceiling = statistics.mean(row["spanish_nll"] for row in case.trained.values())
    return [case.mean(method, "spanish_nll") - ceiling for method in methods]


def table(rows):
    """The rows of `check_scan`, and a count."""
    heads = [
        "case",
        "scan says",
        "best method",
        "right",
        "best at any strength",
        "ahead by, nats",
        "own text, nats beyond trained: scan's, best's",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row["case"],
            row["said"] or "do not",
            row["best"],
            "yes" if row["is right"] else "no",
            row["best at any"],
            "" if row["behind"] is None else f"{row['behind']:.3f}",
            "" if row["price"] is None else ", ".join(f"{x:+.2f}" for x in row["price"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    count = len(rows)
    right, at_any = (sum(row[key] for row in rows) for key in ("is right", "is right at any"))
    lines += [
        "",
        f"Right in {right} of {count} cases: it names the best method at the tool's strength, or "
        "one that is behind by no more than two standard errors; or it says do not where no method "
        f"keeps half of the lift. Against every strength that was measured, {at_any} of {count}.",
    ]
    return "\n".join(lines)


def report(paths, document=None):
    """Check every case of some result files; the last file that has a case counts."""
    found = {}
    for path in paths:
        result = json.loads(Path(path).read_text("utf-8"))
        for case in cases(result):
            key = case.task, case.kind, case.source, case.target
            found[key] = check_scan(result["facts"], case)
    put(table(list(found.values())), document, "scan")
