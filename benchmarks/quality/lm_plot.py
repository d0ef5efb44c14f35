# SPDX-License-Identifier: Apache-2.0
"""Pictures of what methods keep, and of what that costs the target."""

import statistics

from .lm_report import TASKS, cases

# What is shown over the drift.
KEPT = (
    "copy",
    "copy --embeddings 0.5",
    "restore --embeddings 1",
    "prolora k=64",
    "lorax k=320",
    "trained",
)
WON = (
    "lorax core",
    "transport k=64",
    "anchor output",
    "anchor both",
    "restore",
    "restore --strength 1",
)
# What is shown beside its price.
PRICED = (
    "copy",
    "anchor both",
    "restore",
    "copy --embeddings 0.5",
    "copy --embeddings 1",
    "anchor --embeddings 1",
    "restore --embeddings 0.5",
    "restore --embeddings 1",
    "restore --strength 1 --embeddings 1",
    "copy + embeddings untaught",
    "copy + embeddings of 4096 tokens",
)
# Targets of one kind, more and more of it.
SERIES = ("near", "mid", "far")
TEXTS = {"spanish_nll": "own text", "generic_nll": "own text (Wikipedia)"}


def over_drift(result, path):
    """Over the drift of the target: lift and BLEU that are kept, and what is won over copying."""
    related = [c for c in cases(result) if c.task == "enfr" and c.target in SERIES]
    if not related:
        return
    figure, axes = _figure(1, 4, (18, 4.4))
    axes = axes[0]
    lora, lorax = ([c for c in related if c.kind == kind] for kind in ("lora", "lorax"))
    facts = result["facts"]
    _lines(axes[0], lora, KEPT, facts, lambda case, method: case.shares(method)[0])
    axes[0].set(title="LoRA: lift kept in loss, %")
    _lines(axes[1], lora, KEPT, facts, _written)
    axes[1].set(title="LoRA: BLEU of what is written")
    for axis, mine, name in ((axes[2], lora, "LoRA"), (axes[3], lorax, "LoRA-X")):
        _lines(axis, mine, WON, facts, _won)
        axis.axhline(0, color="black", linewidth=1)
        axis.set(title=f"{name}: nats won over copying", ylim=(-0.15, 0.07))
    for axis in axes:
        axis.set(xlabel="relative drift of the target's weights, %")
        axis.legend(fontsize=8)
    _save(figure, path)


def _written(case, method):
    key = TASKS[case.task][1]
    return [row[key] for row in case.methods[method].values() if key in row]


def _won(case, method):
    copy = case.methods["copy"]
    return [copy[s]["nll"] - row["nll"] for s, row in case.methods[method].items() if s in copy]


def _lines(axis, mine, methods, facts, score):
    """A line a method, with the spread over the seeds."""
    for i, method in enumerate(methods):
        scored = [(c, score(c, method)) for c in mine if method in c.methods]
        kept, values = [c for c, v in scored if v], [v for _, v in scored if v]
        if kept:
            mean = [statistics.mean(v) for v in values]
            error = [statistics.stdev(v) if len(v) > 1 else 0 for v in values]
            at = [100 * facts[c.target]["drift"] for c in kept]
            axis.errorbar(at, mean, error, label=method, marker="o", capsize=2, color=f"C{i}")


def over_price(result, path):
    """The gap that methods close, over what they cost the target's own text."""
    related = [c for c in cases(result) if c.kind == "lora" and "copy" in c.methods]
    if not related:
        return
    columns = min(5, len(related))
    lines = -(-len(related) // columns)
    figure, axes = _figure(lines, columns, (3.6 * columns, 3.6 * lines + 1.2))
    for axis in axes.flat[len(related) :]:
        axis.set_axis_off()
    for axis, case in zip(axes.flat, related, strict=False):
        trained = case.mean("trained", case.own)
        axis.axhline(100, color="black", linewidth=1)
        axis.axvline(trained, color="black", linewidth=1, label="trained on the target")
        for i, method in enumerate(m for m in PRICED if m in case.methods):
            gap = [0] if method == "copy" else case.shares(method)[1]
            x = case.mean(method, case.own)
            marker = "osD^v"[i // 10]
            axis.plot(x, statistics.mean(gap), marker, color=f"C{i % 10}", label=method)
        title = TASKS[case.task][0]
        axis.set(title=f"{title}, {case.target}", xlabel=f"{TEXTS[case.own]}, nats")
    for row in axes:
        row[0].set(ylabel="gap closed, %")
    shown = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown.keys(), fontsize=8, ncols=4, loc="lower center")
    figure.tight_layout(rect=(0, 0.75 / (3.6 * lines + 1.2), 1, 1))
    _save(figure, path, is_laid_out=True)


def _figure(rows, columns, size):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=size, squeeze=False)


def _save(figure, path, is_laid_out=False):
    from matplotlib import pyplot

    if not is_laid_out:
        figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)
