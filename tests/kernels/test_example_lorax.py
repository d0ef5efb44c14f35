# SPDX-License-Identifier: Apache-2.0
"""The plain-torch example runs, and its plug-in stays under 30 lines."""

import re
import runpy
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_torch_lorax.py"


def test_both_backends_agree(monkeypatch, capsys):
    arguments = ["example", "--layers", "3", "--size", "64", "--rank", "8"]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    found = re.search(r"difference of an update: (\S+)", capsys.readouterr().out)
    # The tolerance of the bases on either side, for an update as large outside of them as inside.
    assert float(found[1]) < 5e-3


def test_the_plug_is_short():
    text = EXAMPLE.read_text()
    plug = text[text.index("class LoraxKernels") : text.index("def main")]
    assert len(plug.strip().splitlines()) < 30
