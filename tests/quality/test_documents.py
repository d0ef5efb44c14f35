# SPDX-License-Identifier: Apache-2.0
"""Tables in the documents are those of the recorded results."""

import json
import shutil
from pathlib import Path

import pytest

from benchmarks.quality import lm_report, lm_verdicts

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def _read(name):
    return json.loads((RESULTS / name).read_text("utf-8"))


def _language(document):
    name = "quality_language_h200.json"
    lm_report.put(lm_report.tables(_read(name)), document, "tables")
    lm_verdicts.report([RESULTS / "quality_language_shapes_h200.json", RESULTS / name], document)


def _images(document):
    pytest.importorskip("PIL", reason="contact sheets are drawn")
    from benchmarks.quality import image_report

    image_report.write(document, image_report.tables(_read("quality_images_h200.json")))


def _sizes(document):
    from benchmarks.quality import sizes_report

    sizes_report.report(RESULTS / "quality_sizes_h200.json", document)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("quality_tables.md", _language),
        ("quality_images_tables.md", _images),
        ("quality_sizes_tables.md", _sizes),
    ],
    ids=["language", "images", "sizes"],
)
def test_tables_are_those_of_the_results(name, write, tmp_path):
    written = ROOT / "docs" / name
    again = shutil.copy(written, tmp_path)
    write(Path(again))
    assert Path(again).read_text("utf-8") == written.read_text("utf-8")
