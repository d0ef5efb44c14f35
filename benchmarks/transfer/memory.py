# SPDX-License-Identifier: Apache-2.0
"""Peak resident memory of a transfer between two synthetic bf16 checkpoints of 2 GB each.

    PYTHONPATH=.:python python benchmarks/transfer/memory.py --output rows.json

The checkpoints have the shapes of a 1.1 B Llama (width 2048, MLP 5632, grouped keys and values) in
two shards each; every weight of the target is the source's plus 1 % of noise. The adapter of rank
16 updates every linear layer. The transfer runs in a process of its own, whose floor is what it
holds after its imports and one small SVD; the promise is that the peak stays under 1 GiB above it.
Exits with status 1 if it does not.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.record import save

WIDTH, MLP, KV, LORA_RANK = 2048, 5632, 256, 16
LIMIT = 1 << 30
SHAPES = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KV, WIDTH),
    "self_attn.v_proj": (KV, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (MLP, WIDTH),
    "mlp.up_proj": (MLP, WIDTH),
    "mlp.down_proj": (WIDTH, MLP),
}

# Runs in the child: the numbers that /proc gives of it, before and after.
CHILD = """
import json, sys, torch, lorax_transfer, lorax_kernels as lk
def status(key):
    for line in open("/proc/self/status"):
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
lk.transfer_lora(torch.ones(8, 1), torch.ones(1, 8), lk.truncated_svd(torch.randn(8, 8), 2))
floor = status("VmRSS")
adapter, source, target, output, rank, method = sys.argv[1:]
report = lorax_transfer.transfer(
    adapter, source, target, output, rank=int(rank), method=method, device="cpu"
)
facts = {"floor": floor, "peak": status("VmHWM"), "estimate": report.memory_bytes,
         "layers": report.totals.transferred, "seconds": report.seconds}
print(json.dumps(facts))
"""


def modules(layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(layers):
        for name, shape in SHAPES.items():
            yield f"model.layers.{layer}.{name}", shape


def layer_count(gigabytes: float) -> int:
    per_layer = 2 * sum(m * n for m, n in SHAPES.values())
    return max(2, round(gigabytes * 1e9 / per_layer))


def write_models(root: Path, layers: int) -> int:
    """Write source and target; returns the bytes of each."""
    generator = torch.Generator().manual_seed(0)
    shards = 2
    for name in ("source", "target"):
        (root / name).mkdir()
    weight_map: dict[str, str] = {}
    size = 0
    for part in range(shards):
        file = f"model-{part + 1:05d}-of-{shards:05d}.safetensors"
        tensors: dict[str, dict[str, torch.Tensor]] = {"source": {}, "target": {}}
        for module, shape in list(modules(layers))[part::shards]:
            # Columns fall off as i^-0.3: the slow decay of real weights.
            decay = torch.arange(1, shape[1] + 1) ** -0.3
            weight = torch.randn(shape, generator=generator) * decay
            moved = weight + 0.01 * weight.std() * torch.randn(shape, generator=generator)
            tensors["source"][f"{module}.weight"] = weight.bfloat16()
            tensors["target"][f"{module}.weight"] = moved.bfloat16()
            weight_map[f"{module}.weight"] = file
            size += weight.numel() * 2
        for name, found in tensors.items():
            save_file(found, root / name / file)
    for name in ("source", "target"):
        index = root / name / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return size


def write_adapter(root: Path, layers: int) -> int:
    """Write the adapter; returns its bytes."""
    tensors = {}
    for module, (m, n) in modules(layers):
        stem = f"base_model.model.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(LORA_RANK, n).bfloat16()
        tensors[f"{stem}.lora_B.weight"] = torch.randn(m, LORA_RANK).bfloat16()
    path = root / "adapter"
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": LORA_RANK,
        "lora_alpha": LORA_RANK,
        "target_modules": [name.rpartition(".")[2] for name in SHAPES],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return sum(tensor.nbytes for tensor in tensors.values())


def measure(root: Path, rank: int, method: str) -> dict[str, float]:
    places = [str(root / name) for name in ("adapter", "source", "target", "out")]
    shutil.rmtree(root / "out", ignore_errors=True)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *places, str(rank), method],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--method", default="lorax")
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, layers = Path(folder), layer_count(arguments.gigabytes)
        started = time.perf_counter()
        size, adapter = write_models(root, layers), write_adapter(root, layers)
        print(f"wrote 2 x {size / 1e9:.2f} GB in {time.perf_counter() - started:.0f} s", flush=True)
        facts = measure(root, arguments.rank, arguments.method)
    above = facts["peak"] - facts["floor"]
    row = {
        "checkpoint_bytes": size,
        "adapter_bytes": adapter,
        "rank": arguments.rank,
        "method": arguments.method,
        "limit_bytes": LIMIT,
        "above_floor_bytes": above,
        **facts,
    }
    print(json.dumps(row, indent=2))
    if arguments.output is not None:
        save(arguments.output, [row])
    if above > LIMIT:
        sys.exit(f"{above / 2**20:.0f} MiB above the floor, expected at most 1024")


if __name__ == "__main__":
    main()
