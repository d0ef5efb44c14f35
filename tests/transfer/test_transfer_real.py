# SPDX-License-Identifier: Apache-2.0
"""The command line over a real base, its real fine-tune and the demo's trained adapter."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from lorax_transfer import cli
from lorax_transfer.adapters import read_adapter
from lorax_transfer.checkpoints import open_checkpoint
from lorax_transfer.demo.models import SOURCE, TARGET, adapter_directory, model_directory

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(SOURCE.module) is None or find_spec(TARGET.module) is None,
        reason=f"needs the packages {SOURCE.requirement} and {TARGET.requirement}",
    ),
]


@pytest.mark.parametrize("method", ["lorax", "prolora", "copy"])
def test_real_pair(tmp_path: Path, method: str) -> None:
    arguments = [
        *("transfer", str(adapter_directory(SOURCE))),
        *("--source", str(model_directory(SOURCE)), "--target", str(model_directory(TARGET))),
        *("--output", str(tmp_path / "out"), "--method", method, "--rank", "64", "--json"),
    ]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    totals = report["totals"]
    before, after = read_adapter(adapter_directory(SOURCE)), read_adapter(tmp_path / "out")
    assert totals["transferred"] == totals["layers"] == len(before.layers) == len(after.layers)
    assert totals["above_tolerance"] == 0
    # A fine-tune of the base: weights within a few per cent, leading subspaces nearly the same.
    assert 0.005 < totals["drift"] < 0.03
    assert totals["similarity"] > 0.99
    # Its embeddings hardly moved.
    assert totals["embedding_drift"] < 0.5 * totals["drift"]
    assert totals["untouched_drift"] < 0.5 * totals["drift"]
    assert report["recommendation"]["verdict"] == "restore"
    assert "--embeddings" not in report["recommendation"]["reason"]
    with open_checkpoint(model_directory(SOURCE)) as source:
        assert report["source"]["content_hash"] == source.content_hash()
    for layer in report["layers"]:
        old, new = before.layers[layer["module"]], after.layers[layer["module"]]
        dense = new.scale * (new.matrix_B.double() @ new.matrix_A.double())
        was = old.scale * (old.matrix_B.double() @ old.matrix_A.double())
        ratio = float(dense.norm() / was.norm())
        # The report measured float32 factors, the file holds the adapter's dtype.
        rounding = 1e-2 if new.lora_A.dtype != torch.float32 else 1e-4
        assert layer["outcomes"][method]["norm_ratio"] == pytest.approx(ratio, rel=rounding)
