# SPDX-License-Identifier: Apache-2.0
"""What goes into the language measurement and what is made of its rows, without a model."""

import numpy as np
import pytest

from benchmarks.quality import lm_data, lm_report, lm_verdicts


def test_no_test_sentence_is_trained_on():
    words = np.random.default_rng(0).integers(0, 50, (400, 6))
    pairs = [(" ".join(f"w{w}" for w in row), f"f{i}") for i, row in enumerate(words)]
    again = [(english.upper() + " !", "other") for english, _ in pairs]
    rows = lm_data._translation([*pairs, *again], lambda text: [3] * len(text.split()))
    texts = {split: {french for _, _, french in part} for split, part in rows.items()}
    assert len(texts["train"]) > 300
    assert all(texts[split] for split in ("valid", "test"))
    count = sum(map(len, rows.values()))
    assert count == len({lm_data.normalise_sentence(english) for english, _ in pairs})


def test_a_verdict_is_right_by_what_was_measured():
    """`scan` says restore with embeddings; what is best depends on what may be chosen."""
    moved = {
        "trained": (1.0, 2.0),
        "copy": (2.0, 2.1),
        "restore": (2.2, 2.2),
        "restore --embeddings 1": (1.2, 2.4),
        "restore --strength 1 --embeddings 1": (1.1, 3.0),
    }
    row = {"task": "enfr", "source": "source", "target": "far", "adapter": "lora"}
    rows = [{"task": "enfr", "target": "far", "method": "none", "nll": 4.0, "spanish_nll": 1.9}]
    for method, (nll, own) in moved.items():
        for seed in range(3):
            noise = 0.001 * seed * len(method)
            rows.append(
                row | {"method": method, "seed": seed, "nll": nll + noise} | {"spanish_nll": own}
            )
    scan = {"drift": 0.01, "embedding_drift": 0.1, "similarity_excess": 1.0, "untouched_drift": 0.0}
    facts = {"far": {"drift": 0.01, "scan": {"lora enfr": {"0": scan}}}}

    (case,) = lm_report.cases({"rows": rows, "facts": facts})
    found = lm_verdicts.check_scan(facts, case)
    assert found["said"] == found["best"] == "restore --embeddings 1"
    assert found["is right"]
    assert found["best at any"] == "restore --strength 1 --embeddings 1"
    assert not found["is right at any"]
    assert found["price"] == pytest.approx([0.4, 1.0])
    assert not found["is held out"]
    assert found["is right written"] is None
    # By what is written, more is better, and another method may be best.
    for row in rows:
        row["bleu"] = 20.0 + (row["method"] == "copy") + 0.1 * row.get("seed", 0)
    found = lm_verdicts.check_scan(facts, case)
    assert (found["best written"], found["is right written"]) == ("copy", False)
    case.kind = "attention"
    assert lm_verdicts.is_held_out(case)
    case.kind = "lora"
    # A run that was cut short has not every seed of the method.
    kept = [row for row in rows if (row["method"], row.get("seed")) != (found["said"], 2)]
    (cut,) = lm_report.cases({"rows": kept, "facts": facts})
    with pytest.raises(
        lm_verdicts.NotMeasuredError, match="restore --embeddings 1 was not measured"
    ):
        lm_verdicts.check_scan(facts, cut)
    # Embeddings that hardly moved stay, and that loses to copying here.
    scan["embedding_drift"] = 0.01
    found = lm_verdicts.check_scan(facts, case)
    assert (found["said"], found["is right"]) == ("restore", False)
