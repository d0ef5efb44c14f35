# SPDX-License-Identifier: Apache-2.0
"""LoRA-X adapters on tiny models, in memory and on disk."""

import copy
from pathlib import Path
from typing import Any

import adapter_makers
import pairs
import torch

from lorax_transfer.peft import add_lorax_adapter

TARGETS = {
    "llama": "all-linear",
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "convnet": ["conv", "head"],
}
MODELS = {
    "llama": adapter_makers.llama,
    "gpt2": adapter_makers.gpt2,
    "convnet": adapter_makers.convnet,
}


def adapted(kind: str, rank: int = 6, **options: Any) -> torch.nn.Module:
    """A model with a LoRA-X adapter whose cores are random."""
    model = add_lorax_adapter(MODELS[kind](), rank, target_modules=TARGETS[kind], **options)
    adapter_makers.randomise(model)
    return model.eval()


def saved(kind: str, path: Path, rank: int = 6, **options: Any) -> torch.nn.Module:
    """The same, saved in its native form."""
    model = adapted(kind, rank, **options)
    model.save_pretrained(path)
    return model


def deltas(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The update of every adapted module as a matrix (out, in), float64."""
    return {
        name: pairs.as_matrix(module, module.get_delta_weight("default").detach()).double()
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_core")
    }


def trained_copy(model: torch.nn.Module, drift: float = 0.1) -> torch.nn.Module:
    """Another checkpoint of the same model."""
    other = copy.deepcopy(model)
    pairs.perturb(other, drift)
    return other


def run(model: torch.nn.Module) -> torch.Tensor:
    """Outputs on a fixed input, in the model's own dtype."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if hasattr(model, "get_input_embeddings") and hasattr(model.config, "vocab_size"):
            tokens = torch.randint(0, model.config.vocab_size, (2, 7), generator=generator)
            return model(input_ids=tokens).logits
        return model(torch.randn(2, 3, 8, 8, generator=generator))
