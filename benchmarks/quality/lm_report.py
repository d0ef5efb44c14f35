# SPDX-License-Identifier: Apache-2.0
"""Scores of the answers, and tables."""

import json
import lzma
import statistics
from pathlib import Path

# What the tables of a document stand between.
BEGIN, END = "<!-- {} -->", "<!-- end of {} -->"
TARGETS = ("near", "mid", "far", "wiki", "merged", "shallow", "narrow")
KINDS = {"lora": "LoRA", "lorax": "LoRA-X", "attention": "LoRA on attention"}
TASKS = {"enfr": ("English to French", "bleu"), "xsum": ("one-sentence summaries", "rouge_l")}
METRICS = {"bleu": "BLEU", "chrf": "chrF", "rouge_l": "ROUGE-L"}
# They put more of the source back than an adapter holds, or another part of it than the tool does,
# or look at no weight where one has to: bounds and controls, not methods to choose.
CONTROLS = (
    "none",
    "trained",
    "source's embeddings",
    "undo all, source's embeddings",
    "by share of depth",
    "aligned, not sized",
    "copy + embeddings q=1",
    "copy + embeddings q=64",
    "copy + embeddings q=16 input",
    "copy + embeddings q=16 output",
    "copy + embeddings untaught",
    "copy + embeddings of 4096 tokens",
    "copy + embeddings written q=16",
    "copy + embeddings read q=16",
)


def metrics(task, answers, references):
    """BLEU and chrF, or ROUGE-L."""
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


def score(path, references, measure=metrics):
    """Add scores of the answers beside `path` to its rows."""
    path = Path(path)
    result = json.loads(path.read_text("utf-8"))
    beside = path.with_suffix(".answers.jsonl.xz")
    if not beside.exists():
        return
    with lzma.open(beside, "rt", encoding="utf-8") as file:
        for line in file:
            found = json.loads(line)
            # The last rows may be missing where a run was cut.
            if found["row"] < len(result["rows"]):
                row = result["rows"][found["row"]]
                known = references[f"{row['task']}.{row['split']}"]
                row |= measure(row["task"], found["answers"], known[: len(found["answers"])])
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

    def __init__(self, rows, facts, task, kind, source, target):
        self.task, self.kind, self.source, self.target = task, kind, source, target
        # The loss on the text that the target was trained on.
        self.own = f"{facts.get(target, {}).get('text', 'spanish')}_nll"
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
        """Mean over the seeds of a score."""
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
        """Methods to choose from, of every seed."""
        most = max(map(len, self.methods.values()))
        return [m for m, r in self.methods.items() if m not in CONTROLS and len(r) == most]

    def is_level(self, method, best, key="nll"):
        """Whether a method is behind another by no more than two standard errors over the seeds."""
        a, b = self.methods[method], self.methods[best]
        sign = 1 if key.endswith("nll") else -1  # of losses the lower is better
        differences = [sign * (a[seed][key] - b[seed][key]) for seed in a if seed in b]
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
    order = {name: i for i, name in enumerate(TARGETS)}
    keys = sorted(
        found,
        key=lambda k: (k[0], k[2] != "source", order.get(k[3], 9), order.get(k[2], 9), k[1]),
    )
    return [Case(rows, result["facts"], *key) for key in keys]


def table(case, answers_are_whole=True):
    """One case, best method first, between no adapter and the one trained on the target.

    Scores of answers that were cut short are of their beginnings: those are left out.
    """
    keys = ["bleu", "chrf"] if case.task == "enfr" else ["rouge_l"]
    keys = keys if answers_are_whole else []
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
            _spread([r[case.own] for r in rows], 2),
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
            nll = _spread([r["nll"] for r in own], 3)
            line = f"- {name}, {title}: NLL {none['nll']:.3f} without, {nll} with"
            if "answers_end_at" not in result:
                line += f"; {METRICS[metric]} {none.get(metric, float('nan')):.1f} without, "
                line += f"{_spread(scores, 1)} with"
            lines.append(f"{line}.")
    return "\n".join(lines)


def tables(result):
    """All of it, as markdown; without scores of answers where the result says that they are cut."""
    whole = "answers_end_at" not in result
    found = cases(result)
    parts = [_sources(result)]
    for case in found:
        parts += [_title(case, result["facts"]), table(case, whole)]
    return "\n\n".join(parts)


def put(text, document, block):
    """Write text into a block of a document, or to standard output without one."""
    if document is None:
        print(text)
        return
    content = document.read_text("utf-8")
    begin, end = BEGIN.format(block), END.format(block)
    if begin not in content or end not in content:
        raise SystemExit(f"{document} needs the lines {begin} and {end}; put them in.")
    before, after = content.split(begin)[0], content.split(end)[1]
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", "utf-8")
