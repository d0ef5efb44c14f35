# SPDX-License-Identifier: Apache-2.0
"""What an adapted linear layer costs: LoRA-X beside PEFT's LoRA of the same rank.

    PYTHONPATH=.:python python benchmarks/kernels/bench_lorax_layer.py

A square layer with its base weight frozen; a step is forward and backward to the input, a start the
exact bases of one layer, from a call for four. On a GPU in bfloat16 and, but for the start, as a
CUDA graph, so that products are measured and not how fast Python calls them. On a CPU times are
those of the process with one thread: what else runs on the machine does not count.
"""

import argparse
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import torch

from benchmarks.record import save
from lorax_transfer.peft import add_lorax_adapter

_WARM_S = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=None, help="of the layer")
    parser.add_argument("--tokens", type=int, default=None, help="rows of the input")
    parser.add_argument("--ranks", type=int, nargs="+", default=[64, 320])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    is_gpu = torch.cuda.is_available()
    width = args.width or (4096 if is_gpu else 576)
    tokens = args.tokens or (8192 if is_gpu else 1024)
    rows = list(measure(width, tokens, args.ranks, args.repeats, is_gpu))
    print(f"{'adapter':<16}{'rank':>6}{'pass':>10}{'ms':>10}{'over base':>12}")
    for row in rows:
        name, rank, kind = row["adapter"], row["rank"], row["pass"]
        print(f"{name:<16}{rank:>6}{kind:>10}{row['ms']:>10.3f}{row['over_base']:>12.3f}")
    if args.output:
        save(args.output, rows)


def measure(
    width: int, tokens: int, ranks: list[int], repeats: int, is_gpu: bool
) -> Iterator[dict]:
    device, dtype = ("cuda", torch.bfloat16) if is_gpu else ("cpu", torch.float32)
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=device, dtype=dtype, requires_grad=True)
    grad = torch.randn_like(x)
    base = _layer(width, device, dtype)
    alone = {kind: _time(base, x, grad, kind, repeats) for kind in ("forward", "step")}
    for kind, ms in alone.items():
        yield _row(width, tokens, "none", 0, kind, ms, alone)
    for rank, name in itertools.product(ranks, ("lora", "full", "diagonal")):
        model: torch.nn.Module = torch.nn.Sequential(_layer(width, device, dtype))
        if name == "lora":
            config = peft.LoraConfig(r=rank, target_modules=["0"])
            # In the base's dtype, the faster of PEFT's two.
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
        else:
            model = add_lorax_adapter(model, rank, core=name, target_modules=["0"])
        for kind in ("forward", "step"):
            ms = _time(model, x, grad, kind, repeats)
            yield _row(width, tokens, name, rank, kind, ms, alone)
    for rank in ranks:
        ms = _start(width, rank, device, dtype)
        yield _row(width, tokens, "full", rank, "start", ms, {"start": 0.0})


def _start(width: int, rank: int, device: str, dtype: torch.dtype) -> float:
    count, times = 4, []
    for _ in range(3):
        model = torch.nn.Sequential(*(_layer(width, device, dtype) for _ in range(count)))
        targets = [str(i) for i in range(count)]
        start = _now(device)
        add_lorax_adapter(model, rank, target_modules=targets)
        times.append(1e3 * (_now(device) - start) / count)
    return statistics.median(times)


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def _row(
    width: int, tokens: int, adapter: str, rank: int, kind: str, ms: float, alone: dict
) -> dict:
    return {
        "width": width,
        "tokens": tokens,
        "adapter": adapter,
        "rank": rank,
        "pass": kind,
        "ms": ms,
        "over_base": ms - alone[kind],
    }


def _layer(width: int, device: str, dtype: torch.dtype) -> torch.nn.Module:
    layer = torch.nn.Linear(width, width, bias=False, device=device, dtype=dtype)
    return layer.requires_grad_(False)


def _time(
    model: torch.nn.Module, x: torch.Tensor, grad: torch.Tensor, kind: str, repeats: int
) -> float:
    def run() -> None:
        if kind == "forward":
            with torch.no_grad():
                model(x)
            return
        trained = [p for p in model.parameters() if p.requires_grad]
        torch.autograd.grad(model(x), [x, *trained], grad)

    for _ in range(3):
        run()
    return _on_gpu(run, repeats) if x.is_cuda else _on_cpu(run, repeats)


def _on_cpu(run: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times)


def _on_gpu(run: Callable[[], None], repeats: int) -> float:
    # Lazy parts of libraries come to be on another stream than a graph's, before it is captured.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    # Until clocks are what they are under load; then back to back, so that no launch is waited for.
    begun = time.perf_counter()
    while time.perf_counter() - begun < _WARM_S:
        graph.replay()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(events))


if __name__ == "__main__":
    main()
