# SPDX-License-Identifier: Apache-2.0
"""Runs NVIDIA's compute-sanitizer over GPU tests that reach every CUDA kernel, on tiny shapes.

Usage: python scripts/sanitize.py --output benchmarks/results/sanitizer_h200.json

It needs the compiled extension and compute-sanitizer, of a CUDA toolkit or of the package
nvidia-cuda-sanitizer-api (13.4 is the first that brings all of it). The tests run once as they are,
to see which kernels they reach; then under each tool, in the time that is left.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
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
    f"{PROJECT}test_strides_and_alignment[cuda]",
    f"{PROJECT}test_mixed_dtypes_in_one_call[cuda]",
    f"{PRODUCT}test_mixed_shapes[16-0-auto]",
]
OURS = ["--kernel-name", "kns=lorax"]
# Tool: its arguments, environment and longest run in seconds. Hazards in shared memory and barriers
# are a kernel's own business, so other libraries' are left out. An overrun shows only where each
# tensor is an allocation of its own, and what memory holds only if every writer is watched.
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
TOOLS: dict[str, tuple[list[str], dict[str, str], float]] = {
    "memcheck": (["--report-api-errors", "no"], NO_CACHE, 45),
    "racecheck": (OURS, {}, 35),
    "synccheck": (OURS, {}, 25),
    "initcheck": ([], NO_CACHE, 35),
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


def run_plainly(tests: list[str]) -> set[str]:
    """Kernels of ours that the tests reach; exits where they cannot run."""
    import pytest
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        code = pytest.main(["-q", "-p", "no:cacheprovider", *tests])
        torch.cuda.synchronize()
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        sys.exit(f"the tests cannot run (pytest: {code!r}); a test was perhaps renamed")
    names = "\n".join(event.key for event in profile.key_averages())
    return set(re.findall(r"lorax::.*?(\w+_kernel)\b", names))


def sanitize(sanitizer: str, tool: str, tests: list[str], seconds: float) -> dict[str, object]:
    """One tool over the tests: what it counted, and where it found something, the first report."""
    options, more, longest = TOOLS[tool]
    limit = min(longest, seconds)
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"sanitizer_{os.getpid()}_{tool}.log"
    command = [sanitizer, "--tool", tool, "--target-processes", "application-only", *options]
    command += ["--log-file", str(log), sys.executable, "-m", "pytest", "-q"]
    command += ["-p", "no:cacheprovider", *tests]
    start = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
    found = log.read_text() if log.exists() else ""
    log.unlink(missing_ok=True)
    row: dict[str, object] = {
        "tool": tool,
        "options": [*options, *(f"{key}={value}" for key, value in more.items())],
        "seconds": round(time.monotonic() - start, 1),
        "timed_out": process.returncode == -signal.SIGKILL,
    }
    for outcome in ("passed", "failed", "skipped"):
        counts = re.findall(rf"(\d+) {outcome}", output)
        row[outcome] = int(counts[-1]) if counts else 0
    for what, pattern in COUNTS.items():
        hits = [int(next(filter(None, hit.groups()))) for hit in pattern.finditer(found)]
        row[what] = sum(hits) if hits else None
    reports = re.split(r"\n=+[ ]*\n", found)
    ours = [report for report in reports if "lorax::" in report.split("Saved host backtrace")[0]]
    row["reports_in_our_kernels"] = len(ours)
    if row["errors"] or ours:
        row["first_report"] = (ours or reports)[0].splitlines()[:15]
    elif row["errors"] is None:
        row["last_lines"] = (found + output).splitlines()[-15:]
    return row


def is_clean(row: dict[str, object]) -> bool:
    """Whether a tool ran to the end and found nothing."""
    # cuBLAS reads whole vectors, past what was written where a row is padded.
    counted = "reports_in_our_kernels" if row["tool"] == "initcheck" else "errors"
    return row["errors"] is not None and row[counted] == 0


def main() -> int:
    """Saves what every tool found; 1 if one found something or could not run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="sanitizer.json")
    parser.add_argument("--tool", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--seconds", type=float, default=100, help="of all tools together")
    parser.add_argument("--test", nargs="+", default=TESTS, help="pytest ids")
    arguments = parser.parse_args()
    import torch

    import lorax_kernels
    from benchmarks.record import save

    sanitizer = find_sanitizer()
    if sanitizer is None:
        sys.exit(
            "compute-sanitizer was not found: put a CUDA toolkit's bin on PATH, or install "
            "nvidia-cuda-sanitizer-api>=13.4"
        )
    if not torch.cuda.is_available():
        sys.exit("PyTorch sees no CUDA device here")
    compiled = lorax_kernels.backends()[0]
    if not compiled.available:
        sys.exit(f"the compiled kernels cannot run: {compiled.reason}")
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True, check=False)
    end = time.monotonic() + arguments.seconds
    os.chdir(ROOT)
    reached = run_plainly(arguments.test)
    known = kernels_of_sources()
    facts = {
        "sanitizer": " ".join(version.stdout.split()[-4:]),
        "tests": arguments.test,
        "kernels_reached": sorted(known & reached),
        "kernels_not_reached": sorted(known - reached),
    }
    print("not reached:", *facts["kernels_not_reached"] or ["none"], flush=True)
    rows: list[dict[str, object]] = []
    for tool in arguments.tool:
        left = end - time.monotonic()
        if left < 10:
            row: dict[str, object] = {"tool": tool, "errors": None, "not_run": "no time was left"}
        else:
            row = sanitize(sanitizer, tool, arguments.test, left)
        rows.append(row)
        print(row, flush=True)
        save(arguments.output, rows, **facts)
    return 0 if all(map(is_clean, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
