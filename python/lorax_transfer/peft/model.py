# SPDX-License-Identifier: Apache-2.0
"""A model with a LoRA-X adapter: put on, found again, turned into an ordinary LoRA."""

import os
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from .config import LoraXConfig
from .filling import bases_of
from .layers import LoraXLayer

CACHE_VARIABLE = "LORAX_TRANSFER_CACHE"


def add_lorax_adapter(
    model: nn.Module,
    rank: int = 64,
    *,
    core: str = "full",
    energy: float | None = None,
    bandwidth: int = 0,
    scale: float = 1.0,
    sigma_power: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    adapter_name: str = "default",
    cache: str | os.PathLike[str] | None = None,
    **peft_options: Any,
) -> PeftModel:
    """Put a LoRA-X adapter on a model, ready to train.

    Args:
        model: any module, or a `PeftModel` that has LoRA-X adapters already.
        rank: singular directions to keep in every layer, capped at its shorter side.
        core: "diagonal", "full" or "banded".
        energy: keep the fewest directions, up to `rank`, that hold this share of each weight.
        bandwidth: side diagonals of a banded core.
        scale: what multiplies the update.
        sigma_power: weigh directions by this power of their relative singular values.
        target_modules: names, a regular expression, or "all-linear".
        adapter_name: its name in the model.
        cache: directory of bases to reuse and add to; by default that of the environment variable
            LORAX_TRANSFER_CACHE, and none without it.
        peft_options: further options of `LoraXConfig`, such as `task_type` or `lora_dropout`.

    Returns:
        The model, wrapped by PEFT; only the cores are trainable.

    Raises:
        ValueError: an option is out of range, or a target already has an ordinary LoRA.
        TypeError: a target is quantised.

    Example:
        >>> model = add_lorax_adapter(model, 64, core="full")  # doctest: +SKIP
        >>> Trainer(model, arguments, train_dataset=data).train()  # doctest: +SKIP
    """
    config = LoraXConfig(
        r=rank,
        core=core,
        energy=energy,
        bandwidth=bandwidth,
        scale=scale,
        sigma_power=sigma_power,
        target_modules=target_modules,
        **peft_options,
    )
    config.waits_for_bases = True
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
    else:
        model = get_peft_model(model, config, adapter_name)
    fill_bases(model, adapter_name, cache)
    return model


def lorax_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraXLayer]:
    """The layers of a model that have a LoRA-X adapter of that name, by module path."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraXLayer) and adapter_name in module.lora_core
    }


def fill_bases(
    model: nn.Module, adapter_name: str, cache: str | os.PathLike[str] | None = None
) -> None:
    """Compute the bases of an adapter that has none yet, all layers in one call."""
    config = model.peft_config[adapter_name]
    layers = list(lorax_layers(model, adapter_name).values())
    cache = cache or os.environ.get(CACHE_VARIABLE) or None
    weights = [layer.base_matrix() for layer in layers]
    svds = bases_of(
        weights,
        [layer.r[adapter_name] for layer in layers],
        config.energy,
        None if cache is None else Path(cache),
    )
    for layer, svd in zip(layers, svds, strict=True):
        layer.set_bases(adapter_name, svd, config)
    config.waits_for_bases = False
