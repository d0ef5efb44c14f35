# SPDX-License-Identifier: Apache-2.0
"""Tiny models for the doors, with every kind of layer that PEFT adapts."""

import os

# No test may reach the network, which peft would do to look for a base model's config.
os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
from transformers.pytorch_utils import Conv1D


class Net(torch.nn.Module):
    """Linear layers of two shapes and dtypes of weight, a Conv1D, an embedding and convolutions."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(40, 24)
        self.fc1 = torch.nn.Linear(24, 32)
        self.fc2 = torch.nn.Linear(24, 32)
        self.back = torch.nn.Linear(32, 24)
        self.conv1d = Conv1D(32, 24)
        self.conv3 = torch.nn.Conv2d(4, 14, 3)
        self.conv1 = torch.nn.Conv2d(14, 16, 1)
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = self.back(torch.tanh(self.fc1(x) + self.fc2(x) + self.conv1d(x)))
        image = torch.zeros(1, 4, 5, 5, dtype=x.dtype)
        return x + self.conv1(self.conv3(image)).mean()


LINEAR = ["fc1", "fc2", "back"]
EVERYTHING = [*LINEAR, "conv1d", "embed", "conv3", "conv1"]


def randomise(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def two_adapters(
    targets: list[str], dtype: torch.dtype = torch.float32, **config
) -> peft.PeftModel:
    """Adapters "one" of rank 3 and "two" of rank 5 on one model, with different scales."""
    model = peft.get_peft_model(
        Net(dtype), peft.LoraConfig(r=3, lora_alpha=6, target_modules=targets, **config), "one"
    )
    model.add_adapter("two", peft.LoraConfig(r=5, lora_alpha=4, target_modules=targets, **config))
    randomise(model)
    return model


def lora_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def updates(model: torch.nn.Module, adapter: str) -> dict[str, torch.Tensor]:
    return {
        name: layer.get_delta_weight(adapter).detach() for name, layer in lora_layers(model).items()
    }
