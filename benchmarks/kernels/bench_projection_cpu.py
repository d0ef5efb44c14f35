# SPDX-License-Identifier: Apache-2.0
"""Times `project` on a CPU against a loop of PyTorch's products, a row a case and method.

    python benchmarks/kernels/bench_projection_cpu.py --output projection_cpu.json

One block of TinyLlama, both sides of its seven layers, rank 320. The two take turns, so that
whatever else the machine does meets both; `ms` is the median of the process's CPU time, which
waiting for a processor is no part of, and `ratio` the loop's over ours.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.kernels.bench_projection import TINYLLAMA, error, layers, loop
from benchmarks.record import save
from lorax_kernels.ops import project

CASES = (("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "fp16"), ("bf16", "bf16"), ("fp16", "fp16"))
RANK, TURNS = 320, 15


def measure(r, basis, factor):
    blocks, bases = layers(TINYLLAMA, RANK, r, basis, factor, "cpu")
    methods = {"torch": lambda: loop(blocks, bases), "project": lambda: project(blocks, bases)}
    errors = {name: error(run(), blocks, bases, len(blocks)) for name, run in methods.items()}
    times = {name: [] for name in methods}
    for _ in range(TURNS):
        for name, run in methods.items():
            start = time.process_time()
            run()
            times[name].append(1e3 * (time.process_time() - start))
    ms = {name: statistics.median(found) for name, found in times.items()}
    rows = []
    for name in methods:
        row = {"case": "tinyllama block", "rank": RANK, "r": r, "basis": basis, "factor": factor}
        row |= {"method": name, "ms": ms[name], "ratio": ms["torch"] / ms[name]}
        rows.append({**row, "error": errors[name]})
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    for basis, factor in CASES:
        for r in (4, 16, 64):
            rows += measure(r, basis, factor)
            row = rows[-1]
            print(
                f"r {r:3d}  bases {basis}, factors {factor}: {row['ms']:7.1f} ms, the loop "
                f"{row['ratio']:.2f} times as long; error {row['error']:.1e}",
                flush=True,
            )
    save(arguments.output, rows)


if __name__ == "__main__":
    main()
