# SPDX-License-Identifier: Apache-2.0
"""Scores of the answers, tables, a plot, and how often `scan` names the best method."""

import gzip
import json
import re
import statistics
from dataclasses import fields
from pathlib import Path

from lorax_transfer.recommend import recommend
from lorax_transfer.report import AlignmentFacts, Totals
from lorax_transfer.settings import restored_share

# What the tables of a document stand between.
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
KINDS = {"lora": "LoRA", "lorax": "LoRA-X"}
TASKS = {"enfr": ("English to French", "bleu"), "xsum": ("one-sentence summaries", "rouge_l")}
METRICS = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}
# They put more of the source back than an adapter holds, or on one side only where PEFT ties both,
# or look at no weight where one has to: bounds and controls, not methods to choose.
CONTROLS = (
    "none",
    "trained",
    "copy x1.2",
    "index copy k=320",
    "index copy k=64",
    "undo all",
    "source's embeddings",
    "undo all, source's embeddings",
    "by share of depth",
    "aligned, not sized",
    "copy + embeddings q=16 input",
    "copy + embeddings q=16 output",
    "copy + embeddings untaught",
)
# The setting that `lorax-transfer --method NAME` stands for, the first that was measured.
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
# What the plot shows.
KEPT = ("copy", "source's embeddings", "prolora k=64", "prolora k=320", "lorax k=320", "lorax k=64")
WON = (
    "lorax core",
    "transport k=64",
    "anchor output",
    "anchor both",
    "restore q=16",
    "restore q=16 w=0.5",
    "restore",
    "restore --embeddings 1",
    "anchor --embeddings 1",
    "copy --embeddings 1",
)
# Nats that a method may cost the target's own text beyond what copying or an adapter trained on the
# target costs it; with more it wins by undoing what the target was trained for.
SKILL_MARGIN = 0.05


def _metrics(task, answers, references):
    if task == "enfr":
        from sacrebleu.metrics import BLEU, CHRF

        return {
            "bleu": round(BLEU().corpus_score(answers, [references]).score, 2),
            "chrf": round(CHRF().corpus_score(answers, [references]).score, 2),
        }
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    scores = [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    return {"rouge_l": round(100 * statistics.mean(scores), 2)}


def score(path, references):
    """Add BLEU, chrF and ROUGE-L of the answers beside `path` to its rows, once."""
    path = Path(path)
    result = json.loads(path.read_text("utf-8"))
    beside = path.with_suffix(".answers.jsonl.gz")
    if not beside.exists():
        return
    with gzip.open(beside, "rt", encoding="utf-8") as file:
        for line in file:
            found = json.loads(line)
            # The last rows may be missing where a run was cut.
            if found["row"] < len(result["rows"]):
                row = result["rows"][found["row"]]
                known = references[f"{row['task']}.{row['split']}"]
                row |= _metrics(row["task"], found["answers"], known[: len(found["answers"])])
    rows = ",\n".join("  " + json.dumps(row) for row in result.pop("rows"))
    head = json.dumps(result, indent=1)[:-2]
    path.write_text(f'{head},\n "rows": [\n{rows}\n ]\n}}\n', "utf-8")


def select(rows, **wanted):
    """Rows that have all of these values."""
    return [row for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def _spread(values, digits):
    if not values:
        return ""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


class Case:
    """One task, kind of adapter, source and target: rows by method."""

    def __init__(self, rows, task, kind, source, target):
        self.task, self.kind, self.source, self.target = task, kind, source, target
        own = select(rows, task=task, adapter=kind, source=source, target=target)
        self.methods = {}
        for row in own:
            self.methods.setdefault(row["method"], {})[row["seed"]] = row
        self.none = select(rows, task=task, target=target, method="none")[0]
        # On the way back to the source, the ceiling is the source's own adapter.
        ceiling = select(rows, task=task, adapter=kind, target=target, method="trained")
        self.trained = {row["seed"]: row for row in ceiling}
        self.methods.setdefault("trained", self.trained)

    def mean(self, method, key="nll"):
        """Mean over the seeds."""
        return statistics.mean(row[key] for row in self.methods[method].values())

    def shares(self, method):
        """By seed: share of the ceiling's lift kept, and of the gap from copy to it closed."""
        lift, gap = [], []
        copy = self.methods.get("copy", {})
        for seed, row in self.methods[method].items():
            if seed not in self.trained:
                continue
            best, none = self.trained[seed]["nll"], self.none["nll"]
            lift.append(100 * (none - row["nll"]) / (none - best))
            if seed in copy and method not in ("copy", "trained"):
                given = copy[seed]["nll"]
                gap.append(100 * (given - row["nll"]) / (given - best))
        return lift, gap

    def candidates(self):
        """Methods to choose from."""
        return [m for m in self.methods if m not in CONTROLS]

    def keeps_skill(self, method):
        """Whether the target's own text costs no more than with copying or with the ceiling."""
        known = [m for m in ("copy", "trained") if m in self.methods]
        limit = max(self.mean(m, "spanish_nll") for m in known) + SKILL_MARGIN
        return self.mean(method, "spanish_nll") <= limit

    def is_level(self, method, best):
        """Whether a method is behind another by no more than two standard errors over the seeds."""
        a, b = self.methods[method], self.methods[best]
        differences = [a[seed]["nll"] - b[seed]["nll"] for seed in a if seed in b]
        count = len(differences)
        noise = 2 * statistics.stdev(differences) / count**0.5 if count > 1 else 0.0
        return statistics.mean(differences) <= noise

    def is_lost(self):
        """Whether no method keeps half of the lift, so that a new adapter is the advice."""
        best = min(self.candidates(), key=self.mean)
        trained = statistics.median(row["nll"] for row in self.trained.values())
        moved = statistics.median(row["nll"] for row in self.methods[best].values())
        return self.none["nll"] - moved < 0.5 * (self.none["nll"] - trained)


def cases(result):
    """Every case that was measured, without the adapters on their own models."""
    rows, found = result["rows"], {}
    for row in rows:
        if row.get("source") and row["source"] != row["target"]:
            found[row["task"], row["adapter"], row["source"], row["target"]] = None
    order = {name: i for i, name in enumerate(("near", "mid", "far", "shallow", "narrow"))}
    keys = sorted(
        found,
        key=lambda k: (k[0], k[2] != "source", order.get(k[3], 9), order.get(k[2], 9), k[1]),
    )
    return [Case(rows, *key) for key in keys]


def table(case):
    """One case, best method first, between no adapter and the one trained on the target."""
    keys = ["bleu", "chrf"] if case.task == "enfr" else ["rouge_l"]
    moved = sorted((m for m in case.methods if m != "trained"), key=case.mean)
    names = [METRICS[k] for k in keys]
    heads = ["method", "NLL", *names, "lift kept, %", "gap closed, %", "own text, NLL", "ms"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for method in ["none", *moved, "trained"]:
        if method == "none":
            rows, lift, gap = [case.none], [], []
        else:
            rows = list(case.methods[method].values())
            lift, gap = case.shares(method)
        times = [r["transfer_ms"] for r in rows if "transfer_ms" in r and method != "trained"]
        cells = [
            f"*{method}*" if method in CONTROLS else method,
            _spread([r["nll"] for r in rows], 3),
            *(_spread([r[k] for r in rows if k in r], 1) for k in keys),
            _spread(lift, 0),
            _spread(gap, 0),
            _spread([r["spanish_nll"] for r in rows], 2),
            f"{statistics.median(times):.0f}" if times else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _title(case, facts):
    about = facts.get(case.target, {})
    drift = f", drift {100 * about['drift']:.2f} %" if "drift" in about else ""
    return f"### {TASKS[case.task][0]}: {KINDS[case.kind]}, {case.source} to {case.target}{drift}"


def _sources(result):
    lines = []
    for task, (title, metric) in TASKS.items():
        for kind, name in KINDS.items():
            own = select(result["rows"], task=task, adapter=kind, source="source", target="source")
            if not own:
                continue
            none = select(result["rows"], task=task, target="source", method="none")[0]
            scores = [r[metric] for r in own if metric in r]
            lines.append(
                f"- {name}, {title}: NLL {none['nll']:.3f} without, "
                f"{_spread([r['nll'] for r in own], 3)} with; {METRICS[metric]} "
                f"{none.get(metric, float('nan')):.1f} without, {_spread(scores, 1)} with."
            )
    return "\n".join(lines)


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


def check_scan(result):
    """A row a case: what `scan` says, what was best, what keeps the target's own skill best."""
    rows = []
    for case in cases(result):
        said = verdict(result["facts"], case)
        named = case.candidates()
        best = min(named, key=case.mean)
        kept = min((m for m in named if case.keeps_skill(m)), key=case.mean, default=best)
        rows.append(
            {
                "case": f"{case.task}, {KINDS[case.kind]}, {case.source} to {case.target}",
                "scan": said,
                "best": best,
                "best with skill": kept,
                "is right": case.is_lost() if said is None else case.is_level(said, best),
                "keeps skill": said is None or case.keeps_skill(said),
                "nats behind": None if said is None else case.mean(said) - case.mean(best),
            }
        )
    return rows


def _scan_table(rows):
    lines = [
        "| case | scan says | best | best that keeps the target's own text | nats behind the best "
        "| right |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        behind = "" if row["nats behind"] is None else f"{row['nats behind']:.3f}"
        cells = [row["case"], row["scan"] or "do not", row["best"], row["best with skill"], behind]
        cells.append("yes" if row["is right"] else "no")
        lines.append("| " + " | ".join(cells) + " |")
    count = len(rows)
    best, kept = (sum(r[k] for r in rows) for k in ("is right", "keeps skill"))
    lines.append("")
    lines.append(
        f"It is right in {best} of {count} cases: it names the best method, or one that is behind "
        "by no more than two standard errors; or it says do not where no method keeps half of the "
        f"lift. What it names costs the target's own text no more than {SKILL_MARGIN} nats beyond "
        f"copying or the ceiling in {kept} of {count}."
    )
    return "\n".join(lines)


def tables(result):
    """All of it, as markdown."""
    found = cases(result)
    parts = [_sources(result)]
    for case in found:
        parts += [_title(case, result["facts"]), table(case)]
    if found:
        parts += ["### What scan says", _scan_table(check_scan(result))]
    return "\n\n".join(parts)


def plot(result, path):
    """Over the drift of the target: the lift that methods keep, and what they win over copying."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    related = [c for c in cases(result) if c.task == "enfr" and c.source == "source"]
    related = [c for c in related if "drift" in result["facts"][c.target]]
    if not related:
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.4))
    lora, lorax = ([c for c in related if c.kind == kind] for kind in KINDS)
    facts = result["facts"]
    _lines(axes[0], lora, KEPT, facts, lambda case, method: case.shares(method)[0])
    axes[0].set(title="LoRA: lift kept, %")
    for axis, mine, name in ((axes[1], lora, "LoRA"), (axes[2], lorax, "LoRA-X")):
        _lines(axis, mine, WON, facts, _won)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(title=f"{name}: nats won over copying", ylim=(-0.15, 0.07))
    for axis in axes:
        axis.set(xlabel="relative drift of the target's weights, %")
        axis.legend(fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _won(case, method):
    copy = case.methods["copy"]
    return [copy[s]["nll"] - row["nll"] for s, row in case.methods[method].items() if s in copy]


def _lines(axis, mine, methods, facts, score):
    """A line a method, with the spread over the seeds."""
    for i, method in enumerate(methods):
        kept = [c for c in mine if method in c.methods]
        values = [score(c, method) for c in kept]
        if kept:
            mean = [statistics.mean(v) for v in values]
            error = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            at = [100 * facts[c.target]["drift"] for c in kept]
            axis.errorbar(at, mean, error, label=method, marker="o", capsize=2, color=f"C{i}")


def report(path, images, document=None, block="tables"):
    """Write the plot, and the tables into a block of the document or to standard output."""
    result = json.loads(Path(path).read_text("utf-8"))
    suffix = "" if block == "tables" else f"_{block}"
    plot(result, Path(images) / f"quality_language{suffix}.png")
    text = tables(result)
    if document is None:
        print(text)
        return
    content = document.read_text("utf-8")
    begin, end = BEGIN.format(block), END.format(block)
    if begin not in content or end not in content:
        raise SystemExit(f"{document} needs the lines {begin} and {end}; put them in.")
    before, after = content.split(begin)[0], content.split(end)[1]
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")
