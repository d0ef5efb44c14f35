# SPDX-License-Identifier: Apache-2.0
"""Rules that linters do not know: what reviewers would otherwise repeat.

Usage: python scripts/check_repository.py
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 500
LARGEST = 1 << 20
# (what is wrong, pattern, files it is looked for in)
PATTERNS = [
    ("commented-out test", re.compile(r"^\s*#\s*@pytest"), ("tests/",)),
    (
        "a note to do without an issue or version",
        re.compile(r"\b(TODO|FIXME|XXX)\b(?!\()"),
        ("lorax_kernels/", "python/", "csrc/", "tests/"),
    ),
    ("print in the package", re.compile(r"^\s*print\("), ("lorax_kernels/",)),
    ("assert as validation", re.compile(r"^\s*assert\b"), ("lorax_kernels/", "python/")),
    ("make_block_ptr, which Triton removes", re.compile(r"make_block_ptr"), ("lorax_kernels/",)),
    (
        "unsafe unpickling",
        re.compile(r"torch\.load\((?!.*weights_only=True)|\bpickle\.load"),
        ("lorax_kernels/", "python/", "benchmarks/", "tests/"),
    ),
]
SOURCES = (".py", ".cu", ".cuh", ".cpp", ".h")


def tracked() -> list[str]:
    """Files of the repository that are there."""
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [name for name in listing.stdout.splitlines() if (ROOT / name).exists()]


def problems(name: str) -> list[str]:
    """What is wrong with one file."""
    path = ROOT / name
    found = []
    # Trained adapters and measured results are data; code and prose are not that large.
    if path.stat().st_size > LARGEST and not name.startswith("python/lorax_transfer/demo/data/"):
        found.append(f"{name}: larger than 1 MiB")
    if not name.endswith(SOURCES):
        return found
    lines = path.read_text().splitlines()
    if len(lines) > LONGEST:
        found.append(f"{name}: {len(lines)} lines; split it where it holds two ideas")
    if lines and "SPDX-License-Identifier: Apache-2.0" not in lines[0]:
        found.append(f"{name}: the first line must be the SPDX identifier")
    for what, pattern, where in PATTERNS:
        if name.startswith(where):
            hits = (i for i, line in enumerate(lines, 1) if pattern.search(line))
            found += [f"{name}:{i}: {what}" for i in hits]
    return found


def main() -> int:
    """Prints every problem; 1 if there is one."""
    found = [problem for name in tracked() for problem in problems(name)]
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if "## [Unreleased]" not in changelog:
        found.append("CHANGELOG.md: there must be an [Unreleased] section")
    for problem in found:
        print(problem)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
