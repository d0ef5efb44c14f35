# SPDX-License-Identifier: Apache-2.0
"""The program that compute-sanitizer runs compiles and launches every kernel; no GPU is needed."""

import re
import shutil
from pathlib import Path

import pytest
from sanitize.build import CSRC, FLAGS, SOURCES, run

ROOT = CSRC.parent


def test_program_compiles(tmp_path: Path) -> None:
    """As one file and without code for the device: what the kernels become is tested elsewhere."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    whole = tmp_path / "all.cu"
    whole.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    only_look = ["-fdevice-syntax-only", "-Xcompiler", "-Wall,-fsyntax-only", "-arch=sm_80"]
    command = [nvcc, *FLAGS, *only_look, f"-I{SOURCES[0].parent}", "-c", str(whole)]
    assert run([*command, "-o", str(tmp_path / "all.o")]) == ""


def test_program_calls_every_launcher() -> None:
    headers = "\n".join(path.read_text() for path in sorted((CSRC / "kernels").glob("*.cuh")))
    launchers = set(re.findall(r"^inline cudaError_t (\w+)\(", headers, re.MULTILINE))
    # A launcher that others call is reached through them.
    launchers -= set(re.findall(r"return (\w+)<", headers))
    program = "\n".join(source.read_text() for source in SOURCES)
    assert len(launchers) > 15
    assert {name for name in launchers if not re.search(rf"\b{name}\b", program)} == set()
