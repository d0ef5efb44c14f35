# SPDX-License-Identifier: Apache-2.0
"""Runs NVIDIA's compute-sanitizer over every CUDA kernel, on small shapes.

Usage: python scripts/sanitize.py --output benchmarks/results/sanitizer_h200.json

A program without PyTorch and cuBLAS (tests/sanitize) launches each kernel on its own, so that the
tools have only these to instrument; it takes nvcc. GPU tests reach the same kernels through the
ops; they take the compiled extension. Both run once as they are, to see which kernels they reach,
then under each tool, in the time that is left. compute-sanitizer comes with a CUDA toolkit or with
the package nvidia-cuda-sanitizer-api (13.4 is the first that brings all of it).
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "python")]

OPS, NARROW, PROJECT, PRODUCT = (
    f"tests/gpu/test_{name}.py::" for name in ("ops", "narrow_gpu", "project", "product_gpu")
)
TESTS = [
    f"{OPS}test_smallest_of_each",
    f"{OPS}test_thin_matmul[backend=cuda-3x63x199x7 W^T-float16-pieces=1]",
    f"{OPS}test_gram[backend=cuda-2x199x63-bfloat16]",
    f"{OPS}test_rotate[backend=cuda-k=33-2x199x63]",
    f"{OPS}test_shift[backend=cuda-2x199x63]",
    f"{OPS}test_orthonormalize[backend=cuda-2x199x63]",
    f"{NARROW}test_cholesky_qr[2x199x63-scale=1]",
    f"{NARROW}test_ritz[2x1025x199x32x6-flat-scale=1]",
    f"{NARROW}test_ritz_status[l=31]",
    f"{PROJECT}test_strides_and_alignment[cuda-2xbf16-bf16]",
    f"{PROJECT}test_mixed_dtypes_in_one_call[cuda]",
    f"{PRODUCT}test_mixed_shapes[16-0-auto]",
]
Row = dict[str, object]
Options = tuple[list[str], dict[str, str], float]
# Tool: its options, the environment, its longest run in seconds. An overrun shows only where each
# tensor is an allocation of its own. racecheck dies of what else PyTorch loads, and initcheck does
# not see what cuBLAS writes.
TEST_TOOLS: dict[str, Options] = {
    "memcheck": (["--report-api-errors", "no"], {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, 45),
    "synccheck": (["--kernel-name", "kns=lorax"], {}, 25),
}
# The same and what the program is told: initcheck takes poison for a write.
PROGRAM_TOOLS: dict[str, tuple[Options, list[str]]] = {
    "memcheck": (([], {}, 20), []),
    "synccheck": (([], {}, 20), []),
    "initcheck": (([], {}, 20), ["--unpoisoned"]),
    # Last: it takes more than twenty times as long as the others.
    "racecheck": ((["--racecheck-report", "all"], {}, 90), []),
}
COUNTS = {
    "errors": re.compile(r"ERROR SUMMARY: (\d+) error|SUMMARY: .*\((\d+) errors?"),
    "warnings": re.compile(r"SUMMARY: .*, (\d+) warnings?\)"),
}


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, in a CUDA toolkit, or in a package."""
    toolkits = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))]
    toolkits += sorted(Path("/usr/local").glob("cuda*"), reverse=True)
    packages = [Path(entry) / "nvidia" / "cu13" for entry in sys.path if entry]
    # A package before 13.4 has the program, and not what it starts programs with.
    packages = [root for root in packages if (root / "compute-sanitizer").is_dir()]
    for root in (*toolkits, *packages):
        for place in ("bin", "compute-sanitizer"):
            if os.access(path := root / place / "compute-sanitizer", os.X_OK):
                return str(path)
    return shutil.which("compute-sanitizer")


def kernels_of_sources() -> set[str]:
    """Names of all kernels in csrc."""
    sources = [path.read_text() for path in sorted((ROOT / "csrc").rglob("*.cu*"))]
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", "\n".join(sources)))


def kernels_in(text: str) -> set[str]:
    """Kernels of ours among demangled names."""
    return set(re.findall(r"lorax::.*?(\w+_kernel)\b", text))


def count_outcomes(output: str) -> Row:
    """What pytest, or the program, says of its checks in its last line."""
    row: Row = {}
    for outcome in ("passed", "failed", "skipped"):
        counts = re.findall(rf"(\d+) {outcome}", output)
        row[outcome] = int(counts[-1]) if counts else 0
    return row


def run_plainly(tests: list[str]) -> set[str]:
    """Kernels of ours that the tests reach; exits where they cannot run."""
    import pytest
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        code = pytest.main(["-q", "-p", "no:cacheprovider", *tests])
        torch.cuda.synchronize()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"the tests cannot run (pytest: {code!r}); a test was perhaps renamed")
    return kernels_in("\n".join(event.key for event in profile.key_averages()))


def build_program(folder: Path) -> Path:
    """The program of tests/sanitize, for the GPU that is here."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    from tests.sanitize.build import build

    if CUDA_HOME is None:
        sys.exit("nvcc was not found: set CUDA_HOME to a CUDA toolkit")
    major, minor = torch.cuda.get_device_capability()
    return build(str(Path(CUDA_HOME) / "bin" / "nvcc"), f"sm_{major}{minor}", folder)


def sanitize(sanitizer: str, tool: str, options: Options, command: list[str], left: float) -> Row:
    """One tool over a command: what it counted, and where it found something, the first report."""
    flags, environment, longest = options
    log = Path(tempfile.gettempdir()) / f"sanitizer_{os.getpid()}_{tool}.log"
    whole = [sanitizer, "--tool", tool, "--target-processes", "application-only", *flags]
    whole += ["--log-file", str(log), *command]
    start = time.monotonic()
    process = subprocess.Popen(
        whole,
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=min(longest, left))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    found = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    row: Row = {
        "tool": tool,
        "options": [*flags, *(f"{key}={value}" for key, value in environment.items())],
        "seconds": round(time.monotonic() - start, 1),
        "timed_out": process.returncode == -signal.SIGKILL,
        **count_outcomes(output),
    }
    has_died = "Internal Sanitizer Error" in found + output
    for what, pattern in COUNTS.items():
        hits = [int(next(filter(None, hit.groups()))) for hit in pattern.finditer(found)]
        row[what] = sum(hits) if hits and not has_died else None
    reports = re.split(r"\n=+[ ]*\n", found)
    ours = [report for report in reports if "lorax::" in report.split("Saved host backtrace")[0]]
    row["reports_in_our_kernels"] = len(ours)
    if row["errors"] or row["warnings"] or ours:
        row["first_report"] = (ours or reports)[0].splitlines()[:15]
    elif row["errors"] is None:
        row["last_lines"] = (found + output).splitlines()[-15:]
    return row


def is_clean(row: Row) -> bool:
    """Whether a tool ran to the end and found nothing, in something that launched kernels.

    Tests may fail under a tool, which changes what they time or what memory they find.
    """
    is_right = row.get("passed") and (row["of"] == "tests" or not row.get("failed"))
    return row["errors"] == 0 and not row.get("warnings") and bool(is_right)


class Record:
    """The result file, written again after every row."""

    def __init__(self, path: str, seconds: float, sanitizer: str) -> None:
        """Starts an empty record, and the time."""
        version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True)
        self.path, self.sanitizer = path, sanitizer
        self.end = time.monotonic() + seconds
        self.facts: dict[str, object] = {"sanitizer": " ".join(version.stdout.split()[-4:])}
        self.rows: list[Row] = []
        self.is_complete = True

    def add_kernels(self, of: str, reached: set[str]) -> None:
        """Notes which kernels of csrc something reaches."""
        known = kernels_of_sources()
        self.facts[f"kernels_{of}"] = sorted(known & reached)
        self.facts[f"kernels_not_{of}"] = sorted(known - reached)
        self.is_complete &= not known - reached
        print(f"not {of}:", *sorted(known - reached) or ["none"], flush=True)

    def add(self, of: str, tool: str, options: Options, command: list[str]) -> Row:
        """One tool over a command, in the time that is left."""
        from benchmarks.record import save

        left = self.end - time.monotonic()
        if left < 10:
            row: Row = {"tool": tool, "errors": None, "not_run": "no time was left"}
        else:
            row = sanitize(self.sanitizer, tool, options, command, left)
        row = {"of": of} | row
        self.rows.append(row)
        print(row, flush=True)
        save(self.path, self.rows, **self.facts)
        return row


def over_program(record: Record, tools: list[str]) -> None:
    """The program as it is, then under each tool; where one dies of it, family by family."""
    from tests.sanitize.build import FAMILIES

    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        try:
            program = str(build_program(Path(folder)))
        except RuntimeError as error:
            record.is_complete = False
            print(f"the program was not compiled: {error}", flush=True)
            return
        print(f"compiled in {time.monotonic() - start:.0f} s", flush=True)
        done = subprocess.run([program], capture_output=True, text=True)
        print(done.stdout + done.stderr, flush=True)
        record.facts["program"] = count_outcomes(done.stdout)
        record.is_complete &= done.returncode == 0
        record.add_kernels("launched", kernels_in(done.stdout))
        for tool in tools:
            options, told = PROGRAM_TOOLS[tool]
            row = record.add("program", tool, options, [program, *told])
            if row["errors"] is None and "not_run" not in row:
                for family in FAMILIES:
                    record.add(f"program {family}", tool, options, [program, *told, family])


def over_tests(record: Record, tools: list[str], tests: list[str]) -> None:
    """The tests as they are, then under each tool that can bear PyTorch."""
    import lorax_kernels

    compiled = lorax_kernels.backends()[0]
    if not compiled.available:
        sys.exit(f"the compiled kernels cannot run: {compiled.reason}")
    record.facts["tests"] = tests
    record.add_kernels("reached", run_plainly(tests))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    for tool in tools:
        if tool in TEST_TOOLS:
            record.add("tests", tool, TEST_TOOLS[tool], command)


def main() -> int:
    """Saves what every tool found; 1 if one found something or could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="sanitizer.json")
    parser.add_argument(
        "--of", nargs="+", default=["program", "tests"], choices=["program", "tests"]
    )
    parser.add_argument("--tool", nargs="+", default=list(PROGRAM_TOOLS), choices=PROGRAM_TOOLS)
    parser.add_argument("--seconds", type=float, default=150, help="of everything together")
    parser.add_argument("--test", nargs="+", default=TESTS, help="pytest ids")
    arguments = parser.parse_args()
    import torch

    sanitizer = find_sanitizer()
    if sanitizer is None:
        sys.exit(
            "compute-sanitizer was not found: put a CUDA toolkit's bin on PATH, or install "
            "nvidia-cuda-sanitizer-api>=13.4"
        )
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device here")
    os.chdir(ROOT)
    record = Record(arguments.output, arguments.seconds, sanitizer)
    if "program" in arguments.of:
        over_program(record, arguments.tool)
    if "tests" in arguments.of:
        over_tests(record, arguments.tool, arguments.test)
    return 0 if record.is_complete and all(map(is_clean, record.rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
