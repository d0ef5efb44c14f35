# SPDX-License-Identifier: Apache-2.0
"""A model and its LoRA-X adapters: put on, loaded from files, found."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn

from lorax_transfer.adapters.lorax import NativeLayer, read_lorax
from lorax_transfer.adapters.lorax_form import matching
from lorax_transfer.errors import AdapterError, MatchError
from lorax_transfer.preflight import PathLike

from .bases import bases_of
from .config import LoraXConfig
from .layers import LoraXLayer

CACHE_VARIABLE = "LORAX_TRANSFER_CACHE"


def add_lorax_adapter(
    model: nn.Module,
    rank: int = 128,
    *,
    core: str = "full",
    energy: float | None = None,
    bandwidth: int = 0,
    scale: float = 1.0,
    target_modules: list[str] | str = "all-linear",
    adapter_name: str = "default",
    cache: PathLike | None = None,
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
        target_modules: names, a regular expression, or "all-linear".
        adapter_name: its name in the model.
        cache: directory of bases to reuse and add to; by default that of the environment variable
            LORAX_TRANSFER_CACHE, and none without it.
        peft_options: further options of `LoraXConfig`, such as `task_type` or `lora_dropout`.

    Returns:
        The model, wrapped by PEFT; only the cores are trainable.

    Raises:
        AdapterError: an option is out of range; a target is quantised, has an ordinary LoRA, or
            has equal singular values.

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
        target_modules=target_modules,
        **peft_options,
    )
    with _adapted(model, config, adapter_name) as wrapped:
        layers = lorax_layers(wrapped, adapter_name)
        weights = [layer.base_matrix() for layer in layers.values()]
        ranks = [layer.r[adapter_name] for layer in layers.values()]
        svds = bases_of(weights, ranks, energy, _directory(cache))
        for (module, layer), svd in zip(layers.items(), svds, strict=True):
            layer.set_bases(adapter_name, svd, config, module)
    return wrapped


def load_lorax_adapter(
    model: nn.Module,
    path: PathLike,
    adapter_name: str = "default",
    *,
    is_trainable: bool = False,
    cache: PathLike | None = None,
) -> PeftModel:
    """Load a LoRA-X adapter from its native form onto the base model that it was trained on.

    Args:
        model: the base model, or a `PeftModel` of it. Its weights may be in another dtype than in
            training, if those of training are a rounding of them.
        path: directory that `save_pretrained`, a Trainer or `lorax-transfer` wrote.
        adapter_name: its name in the model.
        is_trainable: whether to go on training it.
        cache: directory of bases to reuse and add to; as for `add_lorax_adapter`.

    Returns:
        The model, wrapped by PEFT.

    Raises:
        AdapterError: the adapter is missing, broken, or of another kind.
        MatchError: the model is not the one that the adapter was trained on.

    Example:
        >>> model = load_lorax_adapter(model, "adapters/summarise")  # doctest: +SKIP
    """
    native = read_lorax(path)
    modules = {name.removeprefix("base_model.model.") for name, _ in model.named_modules()}
    absent = sorted(native.layers.keys() - modules)
    if absent:
        raise MatchError(
            f"the model has no module {absent[0]} that the adapter in {path} is for "
            f"({len(absent)} such); load it onto the base model that it was trained on."
        )
    config = LoraXConfig.from_pretrained(str(path))
    config.inference_mode = not is_trainable
    # By name: the file says exactly which modules it holds.
    config.target_modules = list(native.layers)
    # PEFT goes by names and would warn of another one; the digests below know the weights.
    recorded, config.base_model_name_or_path = config.base_model_name_or_path, None
    with _adapted(model, config, adapter_name) as wrapped:
        config.base_model_name_or_path = config.base_model_name_or_path or recorded
        layers = lorax_layers(wrapped, adapter_name)
        weights = [_trained_on(layer, native.layers[module]) for module, layer in layers.items()]
        ranks = [native.layers[module].rank for module in layers]
        svds = bases_of(weights, ranks, cache=_directory(cache))
        for (module, layer), svd in zip(layers.items(), svds, strict=True):
            layer.set_bases(adapter_name, svd, config, module, native.layers[module].digest)
        set_peft_model_state_dict(wrapped, native.state_dict(), adapter_name)
    return wrapped


def lorax_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, LoraXLayer]:
    """The layers of a model that have a LoRA-X adapter of that name, by module path."""
    return {
        name.removeprefix("base_model.model."): module
        for name, module in model.named_modules()
        if isinstance(module, LoraXLayer) and adapter_name in module.lora_core
    }


@contextmanager
def _adapted(model: nn.Module, config: LoraXConfig, adapter_name: str) -> Iterator[PeftModel]:
    """The model with an adapter that waits for its bases; as it was if something goes wrong."""
    _check_free(model, config, adapter_name)
    config.waits_for_bases = True
    if isinstance(model, PeftModel):
        model.add_adapter(adapter_name, config)
        wrapped = model
    else:
        wrapped = get_peft_model(model, config, adapter_name)
    config.waits_for_bases = False
    try:
        yield wrapped
    except BaseException:
        if wrapped is model:
            wrapped.delete_adapter(adapter_name)
        else:
            wrapped.unload()
        raise


def _check_free(model: nn.Module, config: LoraXConfig, adapter_name: str) -> None:
    if isinstance(model, PeftModel) and adapter_name in model.peft_config:
        raise AdapterError(
            f"the model has an adapter {adapter_name!r} already, expected another name; give "
            "adapter_name, or delete_adapter first."
        )
    for path, module in model.named_modules():
        name = path.removeprefix("base_model.model.")
        is_target = config.target_modules == "all-linear" or bool(
            check_target_module_exists(config, name)
        )
        if is_target and isinstance(module, LoraLayer) and not isinstance(module, LoraXLayer):
            raise AdapterError(
                f"{name} has an ordinary LoRA already, and PEFT keeps the layer that it made for "
                "it; add the LoRA-X adapter first."
            )


def _trained_on(layer: LoraXLayer, native: NativeLayer) -> torch.Tensor:
    weight = matching(layer.base_weight, native.digest)
    if weight is None:
        raise MatchError(
            f"the base weight of {native.module} is not the one that the adapter was trained on; "
            "load the base model that it names, or move it with `lorax-transfer transfer`."
        )
    return layer.as_matrix(weight)


def _directory(cache: PathLike | None) -> Path | None:
    cache = cache or os.environ.get(CACHE_VARIABLE) or None
    return None if cache is None else Path(cache)
