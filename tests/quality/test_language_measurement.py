# SPDX-License-Identifier: Apache-2.0
"""The language measurement from training to document, on random models."""

import dataclasses
import gc
import json
import lzma

import numpy as np
import pytest
from tiny_language import SHAPE

from benchmarks.quality import lm_data, lm_lab, lm_measure, lm_plot, lm_report, lm_verdicts


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """A measurement collects garbage after every part: not among all that tests import."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, examples):
    """What `prepare` writes, of made-up words."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("data")
    words = {f"w{i}": i for i in range(SHAPE.vocab)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.save(str(path / "tokenizer.json"))
    arrays, references = {}, {}
    rng = np.random.default_rng(2)
    for task in lm_data.LENGTH:
        for split, first, last in (("train", 0, 64), ("valid", 64, 80), ("test", 80, 96)):
            rows = range(first, last)
            split_rows = [
                (examples.tokens[i][: examples.starts[i]], examples.tokens[i][examples.starts[i] :])
                for i in rows
            ]
            arrays |= lm_data._pack(
                [(p.tolist(), a.tolist(), "") for p, a in split_rows], f"{task}.{split}"
            )
            texts = [" ".join(f"w{t}" for t in a[:-1]) for _, a in split_rows]
            references[f"{task}.{split}"] = texts
    for name in ("spanish", "generic"):
        for split, size in (("train", 40_000), ("valid", 300)):
            arrays[f"{name}.{split}"] = rng.integers(3, SHAPE.vocab, size).astype(np.uint16)
    np.savez(path / "data.npz", **arrays)
    (path / "references.json").write_text(json.dumps(references))
    return path


TINY = dataclasses.replace(
    lm_lab.FULL,
    steps={"enfr": 8, "xsum": 3},
    batch={"enfr": 8, "xsum": 4},
    targets={"near": 1, "mid": 3, "far": 6},
    others={"wiki": 2, "merged": 2},
    target_rate=5e-3,
    target_batch=2,
    heal_steps=2,
    heal_batch=2,
    test=6,
    drop_layers=1,
    width=40,
    ffn=64,
    seeds=(0, 1),
    rates={
        ("lora", "enfr"): [1e-2, 2e-2],
        ("lorax", "enfr"): [2e-2],
        ("lora", "xsum"): [1e-2],
        ("attention", "enfr"): [1e-2],
    },
    core=8,
    ranks=(8, 16),
    train_length={"enfr": 12, "xsum": 12},
    cases=(
        ("lora", "enfr", ("far", "merged")),
        ("lorax", "enfr", ("mid",)),
        ("lora", "xsum", ("mid", "wiki")),
        ("attention", "enfr", ("mid",)),
    ),
    controls=(("lora", "enfr", ("far",)),),
    skill_rows=1,
    only=(
        "copy",
        "anchor both",
        "restore",
        "restore --embeddings 0.5",
        "restore --embeddings 1",
        "lorax core",
    ),
)


def test_what_is_late_is_left_out(folder, tmp_path, weights, capsys):
    lab = lm_lab.Lab(
        folder, tmp_path / "out.json", device="cpu", scale=TINY, source=(SHAPE, weights), budget=0
    )
    lm_measure.Measurement(lab).run()
    log = capsys.readouterr().out
    assert "late: xsum, wiki, lora is left out" in log
    assert "failed" not in log


def test_answers_can_be_read_before_the_run_has_ended(folder, tmp_path, weights):
    pytest.importorskip("sacrebleu")
    out = tmp_path / "out.json"
    out.with_suffix(".answers.jsonl.xz").write_text("of a run before")
    lab = lm_lab.Lab(folder, out, device="cpu", scale=TINY, source=(SHAPE, weights))
    for count in (1, 2):
        lab.score("source", "enfr", None, skill=False)
        lab.flush()
        lm_report.score(out, lab.corpus.references)
        rows = json.loads(out.read_text())["rows"]
        assert ["bleu" in row for row in rows] == [True] * count
    in_streams = read_answers(out)
    assert [json.loads(line)["row"] for line in in_streams] == [0, 1]
    lab.close()
    assert read_answers(out) == in_streams


def read_answers(out):
    with lzma.open(out.with_suffix(".answers.jsonl.xz"), "rt") as file:
        return file.readlines()


def test_measurement_from_training_to_document(folder, tmp_path, weights, capsys, monkeypatch):
    # These texts are short.
    monkeypatch.setattr(lm_lab, "LENGTH", dict.fromkeys(lm_lab.LENGTH, 12))
    monkeypatch.setattr(lm_lab, "ANSWER", dict.fromkeys(lm_lab.ANSWER, 8))
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    pytest.importorskip("matplotlib")
    lab = lm_lab.Lab(
        folder, tmp_path / "out.json", device="cpu", scale=TINY, source=(SHAPE, weights)
    )
    lm_measure.Measurement(lab).run()
    log = capsys.readouterr().out
    assert "failed" not in log
    assert "late" not in log
    lm_report.score(tmp_path / "out.json", lab.corpus.references)
    result = json.loads((tmp_path / "out.json").read_text())
    rows = result["rows"]
    assert all(("bleu" if row["task"] == "enfr" else "rouge_l") in row for row in rows)
    assert {row["target"] for row in rows} == {"source", *lm_report.TARGETS} - {"near"}
    # Anything else would be another model than the source in all but the norms' weights.
    own = lm_report.select(rows, source="source", target="source", task="enfr", adapter="lora")
    undone = lm_report.select(rows, target="far", method="undo all, source's embeddings")
    copied = lm_report.select(rows, target="far", method="copy")
    losses, given_back, as_it_is = (
        {row["seed"]: row["spanish_nll"] for row in some} for some in (own, undone, copied)
    )
    assert given_back == pytest.approx(losses, abs=0.02)
    assert all(loss < losses[seed] - 0.05 for seed, loss in as_it_is.items())
    found = lm_report.cases(result)
    assert len(found) == 6 + 4
    # What a LoRA was merged in for left the embeddings alone: there is nothing to give back.
    merged = next(c for c in found if c.target == "merged")
    assert merged.own == "generic_nll"
    assert not [name for name in merged.methods if "embeddings" in name]
    whole = next(c for c in found if (c.target, c.kind) == ("far", "lora"))
    assert {"restore", "restore --embeddings 0.5", "copy + embeddings q=1"} < whole.methods.keys()
    bases = result["facts"]["source"]["bases_ms"]
    assert bases.keys() == {"8"}
    scans = result["facts"]["mid"]["scan"]
    adapted = {key: scan["0"]["layers"] for key, scan in scans.items()}
    assert adapted == {"lorax enfr": 21, "lora xsum": 21, "attention enfr": 12}
    far = next(c for c in found if (c.target, c.kind) == ("far", "lora"))
    lift, gap = far.shares("trained")
    assert lift == pytest.approx([100, 100])
    assert gap == []
    assert far.shares("copy")[0] == pytest.approx(
        [
            100
            * (far.none["nll"] - far.methods["copy"][s]["nll"])
            / (far.none["nll"] - far.methods["trained"][s]["nll"])
            for s in TINY.seeds
        ]
    )
    document = tmp_path / "quality_tables.md"
    begin, end = lm_report.BEGIN.format("tables"), lm_report.END.format("tables")
    document.write_text(f"before\n{begin}\n{end}\nafter\n")
    lm_report.put(lm_report.tables(result), document, "tables")
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "### English to French: LoRA, source to far, drift" in text
    assert "BLEU" in text
    assert "ROUGE-L" in text
    cut = lm_report.tables(result | {"answers_end_at": 8})
    assert cut.count("\n") == lm_report.tables(result).count("\n")
    for name in lm_report.METRICS.values():
        assert name not in cut
    for plot in (lm_plot.over_drift, lm_plot.over_price):
        plot(result, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        (tmp_path / "plot.png").unlink()
    lm_verdicts.report([tmp_path / "out.json", tmp_path / "out.json"])
    assert f"of {len(found)} (4 of 4 held out); by loss against" in capsys.readouterr().out
