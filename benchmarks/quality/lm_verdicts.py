# SPDX-License-Identifier: Apache-2.0
"""How often `lorax-transfer scan` names the best method of what was measured."""

import json
import re
from dataclasses import fields
from pathlib import Path

from lorax_transfer.recommend import recommend
from lorax_transfer.report import AlignmentFacts, Totals

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
    "restore --embeddings 1": ("restore --embeddings 1",),
}
# A strength that the user would have to choose; `scan` says none.
BY_HAND = ("restore --strength 1", "restore --strength 1 --embeddings 1")
# What `scan` goes by was set by these.
FIRST_TARGETS = ("near", "mid", "far", "shallow", "narrow")
YES_NO = {True: "yes", False: "no", None: ""}


class NotMeasuredError(Exception):
    """A case lacks the method that it would be judged by."""


def is_held_out(case):
    """Whether the rule of `scan` was made without this case."""
    ends = {case.source, case.target}
    is_first = case.task == "enfr" and case.kind in ("lora", "lorax")
    return not (is_first and ends & set(FIRST_TARGETS))


def _totals(facts, case):
    """What `scan` would read of the case, for the first seed."""
    empty = dict.fromkeys(f.name for f in fields(Totals))
    empty |= dict.fromkeys(
        ("layers", "transferred", "left_out", "excluded", "unvalidated", "above_tolerance"), 0
    )
    scans = facts.get(case.target, {}).get("scan", {}).get(f"{case.kind} {case.task}", {})
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
    """The method that `lorax_transfer.recommend` names, as it was measured; None for "do not".

    Raises:
        NotMeasuredError: it was not measured, or not for every seed.
    """
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
    if not wanted:
        return None
    for method in wanted:
        if method in case.candidates():
            return method
    raise NotMeasuredError(f"{wanted[0]} was not measured for every seed")


def check_scan(facts, case):
    """What `scan` says of a case, and what was best at its own strength and at any."""
    said = verdict(facts, case)
    named = case.candidates()
    at_default = [m for m in named if m not in BY_HAND]
    best, best_at_any = (min(names, key=case.mean) for names in (at_default, named))
    return {
        "case": f"{TASKS[case.task][0]}, {KINDS[case.kind]}, {case.source} to {case.target}",
        "is held out": is_held_out(case),
        "said": said,
        "best": best,
        "is right": case.is_lost() if said is None else case.is_level(said, best),
        "best at any": best_at_any,
        "is right at any": case.is_lost() if said is None else case.is_level(said, best_at_any),
        "behind": None if said is None else case.mean(said) - case.mean(best_at_any),
        "price": _price(case, said, best_at_any),
    } | _by_writing(case, said, at_default)


def _by_writing(case, said, named):
    """The same by BLEU or ROUGE-L, at the tool's strength."""
    key = TASKS[case.task][1]
    named = [m for m in named if all(key in row for row in case.methods[m].values())]
    if not named:
        return {"best written": None, "is right written": None}
    best = max(named, key=lambda method: case.mean(method, key))
    if said is None:
        return {"best written": best, "is right written": case.is_lost()}
    right = said in named and case.is_level(said, best, key)
    return {"best written": best, "is right written": right}


def _price(case, *methods):
    """What methods cost the target's own text beyond an adapter trained on the target."""
    if "copy" not in case.methods or None in methods:
        return None
    ceiling = case.mean("trained", case.own)
    return [case.mean(method, case.own) - ceiling for method in methods]


def table(rows):
    """The rows of `check_scan`, and counts."""
    heads = [
        "case",
        "held out",
        "scan says",
        "best method",
        "right",
        "best by BLEU or ROUGE-L",
        "right by it",
        "best at any strength",
        "ahead by, nats",
        "own text, nats beyond trained: scan's, best's",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row["case"],
            "yes" if row["is held out"] else "",
            row["said"] or "do not",
            row["best"],
            YES_NO[row["is right"]],
            row["best written"] or "",
            YES_NO[row["is right written"]],
            row["best at any"],
            "" if row["behind"] is None else f"{row['behind']:.3f}",
            "" if row["price"] is None else ", ".join(f"{x:+.2f}" for x in row["price"]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Right in {_count(rows, 'is right')} cases: it names the method with the lowest loss at "
        "the tool's strength, or one that is behind by no more than two standard errors; or it "
        "says do not where no method keeps half of the lift. By BLEU or ROUGE-L, with the same "
        f"margin, {_count(rows, 'is right written')}; by loss against every strength that was "
        f"measured, {_count(rows, 'is right at any')}.",
    ]
    return "\n".join(lines)


def _count(rows, key):
    told = [row for row in rows if row[key] is not None]
    held_out = [row for row in told if row["is held out"]]
    right, apart = (sum(row[key] for row in some) for some in (told, held_out))
    return f"{right} of {len(told)} ({apart} of {len(held_out)} held out)"


def report(paths, document=None):
    """Check every case of some result files; the last file that has a case counts."""
    found = {}
    for path in paths:
        result = json.loads(Path(path).read_text("utf-8"))
        for case in cases(result):
            key = case.task, case.kind, case.source, case.target
            try:
                found[key] = check_scan(result["facts"], case)
            except NotMeasuredError as error:  # the run was cut short
                print(f"{', '.join(key)} is left out: {error}")
    put(table(list(found.values())), document, "scan")
