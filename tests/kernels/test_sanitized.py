# SPDX-License-Identifier: Apache-2.0
"""The program that compute-sanitizer runs compiles and launches every kernel; no GPU is needed."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from sanitize.build import CSRC, FLAGS, SOURCES, run

ROOT = CSRC.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> dict:
    """What scripts/sanitize.py defines."""
    monkeypatch.setattr(sys, "path", [*sys.path])  # the script adds to it
    return runpy.run_path(str(ROOT / "scripts" / "sanitize.py"))


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


@pytest.mark.parametrize(
    ("row", "is_clean"),
    [
        ({"of": "tests", "errors": 0, "passed": 12}, True),
        ({"of": "tests", "errors": 0, "passed": 11, "failed": 1}, True),
        ({"of": "tests", "errors": 0, "passed": 0}, False),
        ({"of": "tests", "errors": 1, "passed": 12}, False),
        ({"of": "program", "errors": 0, "warnings": 0, "passed": 3, "failed": 0}, True),
        ({"of": "program", "errors": 0, "warnings": 2, "passed": 3, "failed": 0}, False),
        ({"of": "program", "errors": 0, "passed": 2, "failed": 1}, False),
        ({"of": "program", "errors": None, "not_run": "no time was left"}, False),
    ],
    ids=[
        *["tests", "a test fails", "no test ran", "error in tests"],
        *["program", "warnings", "a check fails", "not run"],
    ],
)
def test_what_counts_as_clean(row: dict, is_clean: bool, script: dict) -> None:
    """Nothing found in nothing that ran is no result."""
    assert script["is_clean"](row) is is_clean


def test_gpu_tests_that_are_sanitized_exist(script: dict) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    done = subprocess.run([*command, *script["TESTS"]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
