# SPDX-License-Identifier: Apache-2.0
"""How much methods differ from copying, with the standard error of that over the pictures.

From the files that a run left, on a CPU: fewer pictures and times than the run, and differences of
one and the same adapter. What another seed's adapter would do it cannot say.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

import lorax_kernels as lk
from benchmarks.quality import image_adapters, image_data, image_methods, image_model, image_scan
from benchmarks.quality.image_adapters import Factors

EVERY, TIMES = 3, 2  # one test picture in three, at two times
BATCH = 64
METHODS = ("copy", "restore 16, half", "restore 16", "anchor both", "lorax core")
TAKEN_BACK = 0.004


def _by_drift(move: image_methods.Move) -> Factors:
    """Restore with a strength that falls with the drift of the layer."""
    factors = {}
    for name, (B, A) in move.adapter.factors.items():
        W_s, W_t = move.source.matrices[name], move.target.matrices[name]
        share = min(1.0, TAKEN_BACK / max(float((W_t - W_s).norm() / W_s.norm()), 1e-12))
        factors[name] = lk.restore_lora(B, A, W_s, W_t, directions=16, strength=share)
    return factors


def losses(
    unet: torch.nn.Module, weights: image_model.Weights, images: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """The denoising loss of every picture."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros(len(images), dtype=torch.float64)
    for time in (torch.arange(TIMES) + 0.5) / TIMES:
        noise = torch.randn(images.shape, generator=generator)
        for rows in torch.arange(len(images)).split(BATCH):
            image, t = images[rows], time.expand(len(rows))
            x = image_model.noised(image, noise[rows], t)
            out = image_model.velocity(unet, weights, x, t, text[rows])
            total[rows] += (out - (noise[rows] - image)).double().square().mean((1, 2, 3)) / TIMES
    return total


@torch.no_grad()
def noise(data: Path, folder: Path, style: str) -> None:
    """Compare methods picture by picture, and add that to the result file."""
    path = folder / "images.json"
    facts = json.loads(path.read_text())
    size = image_scan.measured_size(facts)
    emoji = image_data.load(data, side=size.side)
    rows = emoji.indices("test")[::EVERY]
    images, text = emoji.style(style)[rows], emoji.text[rows]
    unet = image_model.build(size.side, size.channels, size.layers, text.shape[-1])
    source = image_scan.checkpoint(folder, "source", size)
    tensors = load_file(folder / "adapters.safetensors")
    first = facts["rows"][0]["seed"]
    facts["noise"] = []
    for kind in ("lora", "lorax"):
        adapter = image_adapters.restored(tensors, f"{first}.{kind}", source, size.rank)
        known = image_methods.methods(kind)
        chosen: dict[str, Callable] = {m: known[m] for m in METHODS if m in known}
        chosen["restore 16, by drift"] = _by_drift
        for name in size.targets:
            target = image_scan.checkpoint(folder, name, size)
            move = image_methods.Move(source, target, adapter)
            for method, function in chosen.items():
                weights = image_adapters.merge(target.weights, function(move), torch.float32)
                found = losses(unet, weights, images, text)
                if method == "copy":
                    copy = found
                change = found - copy
                row = {
                    **{"pair": name, "kind": kind, "method": method, "pictures": len(rows)},
                    **{"loss": found.mean().item(), "change": change.mean().item()},
                    "error": change.std().item() / math.sqrt(len(rows)),
                }
                facts["noise"].append(row)
                print(row, flush=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.replace(path)
