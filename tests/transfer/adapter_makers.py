# SPDX-License-Identifier: Apache-2.0
"""Tiny models and adapters: saved by the real peft, or written tensor by tensor."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

# No test may reach the network, which peft would do to look for a base model's config.
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import transformers


def llama(tied: bool = False) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config).eval()


def gpt2(tied: bool = True) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=tied
    )
    return transformers.GPT2LMHeadModel(config).eval()


def mixtral() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config).eval()


class ConvNet(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.head = torch.nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean(dim=(2, 3)))


def convnet() -> torch.nn.Module:
    torch.manual_seed(0)
    return ConvNet().eval()


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    """Fill every trainable tensor, so that a factor which is lost changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def save_adapter(base: torch.nn.Module, path: Path, **config: Any) -> torch.nn.Module:
    """Attach a LoRA with random factors to a model and save it; returns the adapted model."""
    model = peft.get_peft_model(base, peft.LoraConfig(**config))
    randomise(model)
    model.save_pretrained(path)
    return model.eval()


def load_adapter(base: torch.nn.Module, path: Path) -> torch.nn.Module:
    return peft.PeftModel.from_pretrained(base, path).eval()


def plain_config(**changes: Any) -> dict[str, Any]:
    """A minimal LoRA configuration; a value of None takes the key out."""
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["fc", "proj"]}
    return {key: value for key, value in {**config, **changes}.items() if value is not None}


def plain_tensors(**extra: torch.Tensor) -> dict[str, torch.Tensor]:
    """Two rank-4 layers, ``h.0.fc`` (16 -> 8) and ``h.0.proj`` (8 -> 16), and what is added."""
    generator = torch.Generator().manual_seed(0)
    stem = "base_model.model.h.0"
    shapes = {
        f"{stem}.fc.lora_A.weight": (4, 16),
        f"{stem}.fc.lora_B.weight": (8, 4),
        f"{stem}.proj.lora_A.weight": (4, 8),
        f"{stem}.proj.lora_B.weight": (16, 4),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**tensors, **extra}


def write_files(
    path: Path,
    config: Any,
    tensors: dict[str, torch.Tensor],
    metadata: dict[str, str] | None = None,
) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, path / "adapter_model.safetensors", metadata=metadata or {"format": "pt"})
    return path
