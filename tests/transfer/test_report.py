# SPDX-License-Identifier: Apache-2.0
"""The report: JSON as docs/report.md says, sums that add up, advice that follows its rules."""

import dataclasses
import json
import math
import re
from pathlib import Path

import pytest
from adapter_makers import llama
from pairs import make_pair
from rich.console import Console

import lorax_transfer
from lorax_transfer.errors import OutputError
from lorax_transfer.plot import draw
from lorax_transfer.recommend import recommend
from lorax_transfer.report import (
    STATUSES,
    AlignmentFacts,
    BasisFacts,
    LayerReport,
    Outcome,
    Report,
    Similarity,
    Totals,
)
from lorax_transfer.settings import METHODS
from lorax_transfer.tables import show
from lorax_transfer.totals import total

DOCS = Path(__file__).parents[2] / "docs" / "report.md"


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """One report of each kind, with excluded and left-out layers among them."""
    root = tmp_path_factory.mktemp("reports")
    pair = make_pair(root, llama, target_modules=["q_proj", "v_proj", "down_proj"])
    models = (pair.adapter, pair.source, pair.target)
    every = lorax_transfer.scan(*models, rank=8)
    limit = sorted(layer.similarity.smaller for layer in every.layers)[2]
    return {
        "scan": every,
        "plan": lorax_transfer.transfer(*models, rank=8, dry_run=True),
        "transfer": lorax_transfer.transfer(
            *models, root / "out", rank=8, exclude=r"1\..*q_proj", min_similarity=limit
        ),
    }


def documented(section: str) -> set[str]:
    """Keys in the first column of a section's table."""
    text = DOCS.read_text().split(f"{section}\n", 1)[1].split("\n##", 1)[0]
    rows = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return set(re.findall("`(.+?)`", "".join(rows)))


@pytest.mark.parametrize("kind", ["scan", "plan", "transfer"])
def test_json_has_the_documented_keys(reports, kind):
    data = json.loads(reports[kind].to_json())
    assert data["kind"] == kind
    assert set(data) == documented("## Schema `lorax-transfer-report/1`")
    assert f"`{data['schema']}`" in DOCS.read_text()
    for name in ("adapter", "source", "target"):
        assert set(data[name]) == documented("### `adapter`, `source`, `target`")
    for layer in data["layers"]:
        assert set(layer) == documented("### `layers[]`")
    assert set(data["totals"]) == documented("### `totals`")
    row = next(line for line in DOCS.read_text().splitlines() if line.startswith("| `settings`"))
    assert set(data["settings"]) == set(re.findall("`(.+?)`", row)) - {"settings"}


def test_json_refuses_what_is_not_json(reports):
    bad = dataclasses.replace(reports["plan"], seconds=math.nan)
    with pytest.raises(ValueError, match="JSON"):
        bad.to_json()


def test_statuses(reports):
    seen = {layer.status for report in reports.values() for layer in report.layers}
    assert seen == set(STATUSES)
    assert all(status in DOCS.read_text() for status in STATUSES)


def layer(norm: float, kept: float, change: float = 0.5, **fields) -> LayerReport:
    basis = BasisFacts(4, 1e-6, 8, "exact", False)
    defaults = {
        "status": "transferred",
        "similarity": Similarity(0.9, 0.8, 0.25, 0.5),
        "drift": 0.01,
        "outcomes": {
            "lorax": Outcome(kept, math.sqrt(kept), change, 4),
            "copy": Outcome(1.0, 1.0, 0.0, 4),
        },
    }
    return LayerReport(
        **{
            "module": "a",
            "reason": "",
            "method": "lorax",
            "lora_rank": 2,
            "rank": 4,
            "source_basis": basis,
            "target_basis": basis,
            "update_norm": norm,
            **defaults,
            **fields,
        }
    )


class TestTotals:
    def test_weights_are_energies(self):
        totals = total([layer(3.0, 0.5, drift=0.01), layer(1.0, 0.1, drift=0.03)], 1e-3)
        assert totals.drift == pytest.approx((9 * 0.01 + 0.03) / 10)
        assert totals.drift_max == 0.03
        assert totals.in_subspace == pytest.approx((9 * 0.5 + 0.1) / 10)
        assert totals.methods["lorax"].energy_kept == pytest.approx(0.46)
        assert totals.methods["lorax"].norm_ratio == pytest.approx(math.sqrt(0.46))
        assert totals.methods["lorax"].change == pytest.approx(0.5)
        assert totals.energy_written == pytest.approx(0.46)
        assert totals.similarity == 0.8
        assert totals.chance == 0.5
        assert totals.similarity_excess == pytest.approx(0.6)

    def test_what_is_not_written_counts_as_lost(self):
        layers = [layer(1.0, 0.5), layer(1.0, 0.5, status="left out")]
        gone = LayerReport("x", "excluded", "", "lorax", 2, update_norm=math.sqrt(2))
        totals = total([*layers, gone], 1e-3)
        assert totals.energy_written == pytest.approx(0.5 / 4)
        assert (totals.transferred, totals.left_out, totals.excluded) == (1, 1, 1)

    def test_bases_above_the_tolerance(self):
        bad = BasisFacts(4, 2e-3, 64, "randomized", False)
        assert (
            total([layer(1.0, 0.5, source_basis=bad), layer(1.0, 0.5)], 1e-3).above_tolerance == 1
        )

    def test_no_energy_at_all(self):
        totals = total([layer(0.0, 0.5, drift=0.02, outcomes={}), layer(0.0, 0.5)], 1e-3)
        assert totals.energy_written is None
        assert totals.drift == pytest.approx(0.015)

    def test_a_full_side_tells_nothing(self):
        assert Similarity(1.0, 0.6, 1.0, 0.5).excess == pytest.approx(0.2)
        assert Similarity(1.0, 1.0, 1.0, 1.0).excess is None


class TestRecommendation:
    def totals(self, **changes) -> Totals:
        similarity = changes.pop("similarity_facts", Similarity(0.95, 0.95, 0.1, 0.1))
        kept, drift = changes.pop("kept", 0.02), changes.pop("drift", 0.01)
        made = total([layer(1.0, kept, similarity=similarity, drift=drift)], 1e-3)
        return dataclasses.replace(made, **changes)

    @pytest.mark.parametrize(
        ("changes", "verdict"),
        [
            ({}, "restore"),
            ({"drift": 0.0}, "copy"),
            ({"drift": 0.0019}, "copy"),
            ({"drift": 0.002}, "restore"),
            ({"drift": 0.25}, "restore"),
            ({"drift": 0.251}, "do not"),
            ({"untouched_drift": 0.02}, "restore"),
            ({"untouched_drift": 0.021}, "anchor"),
            ({"drift": 0.0019, "embedding_drift": 0.01}, "restore"),
            ({"drift": None}, "do not"),
            # Inside the subspaces an update is projected without loss, but that wins nothing.
            ({"kept": 0.95}, "restore"),
            ({"kept": 0.95, "drift": 0.3}, "project"),
            ({"kept": 0.89, "drift": 0.3}, "do not"),
            ({"unvalidated": 1}, "do not"),
            ({"similarity_facts": Similarity(0.12, 0.9, 0.1, 0.1)}, "do not"),
            # Nearly all of the space: keeping the update says nothing about it.
            (
                {
                    "kept": 0.97,
                    "drift": 0.3,
                    "similarity_facts": Similarity(1.0, 1.0, 0.99, 0.99),
                },
                "do not",
            ),
            (
                {"kept": 1.0, "drift": 0.3, "similarity_facts": Similarity(1.0, 1.0, 1.0, 1.0)},
                "do not",
            ),
            (
                {"kept": 0.95, "drift": 0.3, "similarity_facts": Similarity(0.7, 0.7, 0.1, 0.1)},
                "do not",
            ),
        ],
        ids=str,
    )
    def test_rules(self, changes, verdict):
        found = recommend(self.totals(**changes))
        assert found.verdict == verdict
        assert f"**{verdict}**" in DOCS.read_text()
        assert found.reason

    @pytest.mark.parametrize(
        ("changes", "verdict"),
        [
            ({}, "align"),
            ({"likeness": 0.49}, "do not"),
            # Of one depth, it is a pair like any other.
            ({"source_layers": 6, "target_layers": 6}, "do not"),
        ],
        ids=str,
    )
    def test_other_depth(self, changes, verdict):
        facts = {"source_layers": 6, "target_layers": 12, "paired": 6, "likeness": 0.8}
        found = recommend(
            self.totals(drift=0.6), AlignmentFacts("identity", **{**facts, **changes})
        )
        assert found.verdict == verdict
        assert f"**{verdict}**" in DOCS.read_text()

    @pytest.mark.parametrize(
        ("embeddings", "are_given_back"), [(None, False), (0.02, False), (0.021, True)], ids=str
    )
    def test_embeddings_go_with_the_layers_where_they_moved_farther(
        self, embeddings, are_given_back
    ):
        found = recommend(self.totals(embedding_drift=embeddings))
        assert found.verdict == "restore"
        assert ("--embeddings 1" in found.reason) == are_given_back
        # What to do where the price is too high.
        assert ("copy with --embeddings 0.5" in found.reason) == are_given_back

    def test_restore_asks_for_the_target_s_own_skill(self):
        assert "score the target's own skill" in recommend(self.totals()).reason

    def test_thresholds_are_those_of_the_docs(self):
        from lorax_transfer import recommend as rules
        from lorax_transfer import settings

        text = DOCS.read_text().split("### `recommendation`")[1]
        for value in (
            rules.MIN_EXCESS,
            rules.MIN_KEPT,
            rules.MIN_SIMILARITY,
            rules.MIN_DRIFT,
            rules.MAX_DRIFT,
            settings.FARTHER,
            rules.MIN_LIKENESS,
        ):
            assert f"{value:g}" in text


def printed(report: Report, width: int) -> str:
    console = Console(width=width, file=None, record=True, force_terminal=False, quiet=False)
    with console.capture() as capture:
        show(report, console)
    return capture.get()


@pytest.mark.parametrize("width", [80, 100, 160], ids=lambda width: f"width={width}")
@pytest.mark.parametrize("kind", ["scan", "plan", "transfer"])
def test_table_fits_and_names_every_layer(reports, kind, width):
    report = reports[kind]
    text = printed(report, width)
    locations = {model.location for model in (report.adapter, report.source, report.target)}
    for line in text.splitlines():
        # Paths are not broken, so that they can be copied.
        assert len(line) <= width or any(
            place in line for place in [*locations, report.output or "-"]
        )
    for layer in report.layers:
        if layer.status != "excluded":
            assert layer.module.removeprefix("model.layers.") in text
    if kind != "plan":
        assert f"Recommendation: {report.recommendation.verdict}" in text
        for method in set(METHODS) - {"aligned"}:
            assert re.search(rf"^{method}.* [\d.]+%", text, re.MULTILINE)
    if kind == "transfer":
        assert "1 module excluded" in text
        assert "is below" in text


def test_plot_is_a_picture_of_every_layer(reports, tmp_path):
    draw(reports["scan"], tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    # Width and height stand in the header; a blank figure of this size compresses to 10 kB.
    assert int.from_bytes(content[16:20], "big") >= 800
    assert len(content) > 20_000


def test_plot_of_other_shapes(reports, tmp_path):
    scan = reports["scan"]
    bare = [
        dataclasses.replace(x, similarity=None, drift=None, outcomes={"lorax": x.outcomes["lorax"]})
        for x in scan.layers
    ]
    draw(dataclasses.replace(scan, layers=tuple(bare)), tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_plot_of_a_plan_is_refused(reports, tmp_path):
    with pytest.raises(OutputError, match="measures nothing"):
        draw(reports["plan"], tmp_path / "a.png")
