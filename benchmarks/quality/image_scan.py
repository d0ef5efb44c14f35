# SPDX-License-Identifier: Apache-2.0
"""What `lorax-transfer scan` advises for every pair that was measured, from files as users have."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

import lorax_transfer
from benchmarks.quality import image_adapters, image_model
from benchmarks.quality.image_sizes import Size
from benchmarks.quality.image_training import Schedule


def measured_size(facts: dict) -> Size:
    """The size that a result file was measured with."""
    fields = dict(facts["size"])
    fields["channels"] = tuple(fields["channels"])
    for name in ("base", "adapter"):
        fields[name] = Schedule(**fields[name])
    fields["targets"] = {name: Schedule(**each) for name, each in fields["targets"].items()}
    return Size(**fields)


def checkpoint(folder: Path, name: str, size: Size) -> image_adapters.Checkpoint:
    """A model that a run kept."""
    stored = load_file(folder / "models" / f"{name}.safetensors")
    weights = {key: value.float() for key, value in stored.items()}
    width = weights["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    unet = image_model.build(size.side, size.channels, size.layers, width)
    return image_adapters.Checkpoint(name, weights, image_model.layers_of(unet))


def scan(folder: Path) -> None:
    """Scan the first seed's adapters against every target, and add that to the result file."""
    path = folder / "images.json"
    facts = json.loads(path.read_text())
    size = measured_size(facts)
    source = checkpoint(folder, "source", size)
    tensors = load_file(folder / "adapters.safetensors")
    first = facts["rows"][0]["seed"]
    facts["scan"] = []
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("lora", "lorax"):
            adapter = image_adapters.restored(tensors, f"{first}.{kind}", source, size.rank)
            image_adapters.save_peft(
                Path(scratch) / kind, adapter.factors, source.layers, source.name
            )
            for name in size.targets:
                start = time.perf_counter()
                report = lorax_transfer.scan(
                    Path(scratch) / kind,
                    folder / "models" / "source.safetensors",
                    folder / "models" / f"{name}.safetensors",
                    device="cpu",
                    cache=Path(scratch) / "bases",
                )
                advice = report.recommendation
                assert advice is not None, "a scan recommends something"
                row = {
                    **{"pair": name, "kind": kind, "verdict": advice.verdict},
                    **{"reason": advice.reason, "seconds": time.perf_counter() - start},
                }
                facts["scan"].append(row)
                print(row, flush=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(facts, indent=1) + "\n")
    temporary.replace(path)
