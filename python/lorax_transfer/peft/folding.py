# SPDX-License-Identifier: Apache-2.0
"""A LoRA-X adapter of a model in memory, written as an ordinary LoRA."""

from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

import lorax_kernels as lk
from lorax_transfer._fold import card
from lorax_transfer._native import lora_config, lora_layer
from lorax_transfer.adapters import Adapter, write_adapter
from lorax_transfer.errors import AdapterError
from lorax_transfer.preflight import PathLike

from .model import lorax_layers


def save_as_lora(
    model: PeftModel,
    output: PathLike,
    adapter_name: str = "default",
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
) -> None:
    """Write a LoRA-X adapter as an ordinary LoRA of the same update, which stock PEFT loads.

    Args:
        model: model with the adapter.
        output: directory to write.
        adapter_name: its name in the model.
        dtype: of the factors.
        overwrite: replace an existing adapter.

    Raises:
        AdapterError: there is no such LoRA-X adapter, or a convolution is dilated, which PEFT's
            LoRA is not.
        OutputError: the directory exists or cannot be written.

    Example:
        >>> save_as_lora(model, "summarise-lora")  # doctest: +SKIP
    """
    found = lorax_layers(model, adapter_name)
    if not found:
        raise AdapterError(
            f"the model has no LoRA-X adapter {adapter_name!r}, expected one of "
            f"{', '.join(model.peft_config)}; give adapter_name."
        )
    layers = []
    for module, layer in found.items():
        layer.check_foldable(module)
        left, V = (x.detach().cpu() for x in layer.factors_of(adapter_name))
        shape = tuple(layer.base_weight.shape)
        layers.append(lora_layer(module, left, V.mT.contiguous(), shape))
    config = model.peft_config[adapter_name].to_dict()
    base = config["base_model_name_or_path"] or _name_of(model)
    adapter = Adapter(
        layers={layer.module: layer for layer in layers},
        config=lora_config(config, layers),
        metadata={},
        location=Path(output),
        dropped=(),
        content_hash="",
        is_lorax=True,
    )
    write_adapter(
        adapter,
        output,
        base_model_name_or_path=base,
        provenance={"kind": "fold", "version": lk.__version__},
        model_card=card(base),
        dtype=dtype,
        overwrite=overwrite,
    )


def _name_of(model: nn.Module) -> str:
    return getattr(getattr(model, "config", None), "name_or_path", None) or ""
