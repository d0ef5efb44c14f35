# SPDX-License-Identifier: Apache-2.0
"""PEFT's ``adapter_config.json``: what it says of each layer, and what it must say on output."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorax_transfer.adapters.adapter import Adapter, LoraLayer
from lorax_transfer.adapters.peft_names import is_target_module
from lorax_transfer.errors import AdapterError

# Initialisations that leave the base weight alone, so that the saved factors are the update.
_PLAIN_INITS = frozenset({"true", "false", "none", "gaussian", "eva", "orthogonal", "mica"})
# Of these, the ones that make a layer without saved tensors a no-op, whatever its rank and type.
_HARMLESS_INITS = frozenset({"true", "gaussian", "eva"})

# Settings under which B @ A is not, or not alone, what the layer adds.
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA applies only after its invocation tokens",
    "layer_replication": "its layers are repeated ones that no checkpoint holds",
    "use_qalora": "its factors act on pooled inputs",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes among several adapters",
    "kasa_config": "it truncates the base weight and puts a diagonal between the factors",
    "monteclora_config": "its factors are samples of a distribution",
    "megatron_config": "its layers are Megatron's parallel ones",
    "enable_lora": "it is the grouped layout of the first PEFT releases",
}
# VeLoRA changes only the backward pass; the others configure initialisations judged by their name.
_KNOWN_CONFIGS = frozenset(
    {"velora_config", "eva_config", "corda_config", "loftq_config", "lora_ga_config"}
    | {"runtime_config"}
)
_KNOWN_SWITCHES = frozenset({"use_rslora", "use_dora"})


def check_config(config: dict[str, Any], path: Path) -> None:
    """Refuse a configuration that is not of a LoRA this package understands.

    Args:
        config: the parsed ``adapter_config.json``.
        path: the adapter, for messages.

    Raises:
        AdapterError: for another PEFT method, missing or malformed r and lora_alpha, or a setting
            that changes what the factors mean.
    """
    peft_type = config.get("peft_type")
    if peft_type != "LORA":
        raise AdapterError(
            f"{path} has peft_type {peft_type!r}, expected 'LORA'; adapters of other methods have "
            "to be converted to LoRA first."
        )
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            raise AdapterError(
                f"adapter_config.json of {path} has {key} = {config.get(key)!r}, expected a "
                "number; put in the value that the adapter was trained with."
            )
    for key in ("rank_pattern", "alpha_pattern"):
        _check_pattern(key, config.get(key), path)
    for key, value in config.items():
        if not value:
            continue
        unknown = (key.startswith("use_") and key not in _KNOWN_SWITCHES) or (
            key.endswith("_config") and key not in _KNOWN_CONFIGS
        )
        if key in _REFUSED or unknown:
            reason = _REFUSED.get(key, "nothing is known of what it does to the factors")
            raise AdapterError(
                f"{path} was trained with {key} and cannot be carried: {reason}; train the "
                f"adapter without {key}."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_pattern(key: str, pattern: object, path: Path) -> None:
    if pattern is None:
        return
    if not isinstance(pattern, Mapping) or not all(map(_is_number, pattern.values())):
        raise AdapterError(
            f"{key} of {path} is {pattern!r}, expected an object of numbers by module pattern; "
            "correct adapter_config.json."
        )
    for expression in pattern:
        try:
            re.compile(expression)
        except re.error as error:
            raise AdapterError(
                f"{key} of {path} has the key {expression!r}, which is no regular expression "
                f"({error}); correct adapter_config.json."
            ) from error


def config_kinds(config: dict[str, Any]) -> dict[str, list[str]]:
    """The droppable kinds that the settings alone announce.

    A trained bias is not among them: ``bias="all"`` on a model without biases writes nothing, so
    only tensors count.

    Args:
        config: a checked configuration.

    Returns:
        For each kind, the settings that announce it.
    """
    settings = {
        "dora": "use_dora",
        "modules_to_save": "modules_to_save",
        "experts": "target_parameters",
        "trainable_tokens": "trainable_token_indices",
    }
    found = {kind: [f"{key}={config[key]!r}"] for kind, key in settings.items() if config.get(key)}
    init = config.get("init_lora_weights", True)
    if str(init).lower() not in _PLAIN_INITS:
        found["mutated_init"] = [f"init_lora_weights={init!r}"]
    return found


def layer_rank(config: dict[str, Any], module: str) -> int:
    """Rank that PEFT gives a module: its entry in ``rank_pattern``, else ``r``."""
    return _lookup(config.get("rank_pattern"), module, config["r"])


def layer_scale(config: dict[str, Any], module: str, rank: int) -> float:
    """What PEFT multiplies ``B @ A`` of a module with.

    Args:
        config: a checked configuration.
        module: module path.
        rank: the layer's own rank.

    Returns:
        ``alpha / rank``, or ``alpha / sqrt(rank)`` under ``use_rslora``.
    """
    alpha = _lookup(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / _divisor(config, rank))


def _divisor(config: dict[str, Any], rank: int) -> float:
    return math.sqrt(rank) if config.get("use_rslora") else rank


def _lookup(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    # peft.utils.other.get_pattern_key: the first key that matches the end of the path, and the
    # path itself as a plain key where none does.
    pattern = pattern or {}
    for key in pattern:
        if re.match(rf"(.*\.)?({key})$", module):
            return pattern[key]
    return pattern.get(module, default)


def output_config(adapter: Adapter, base_model_name_or_path: str) -> dict[str, Any]:
    """The configuration that makes PEFT compute exactly the layers of an adapter.

    Every key of the input is kept. Ranks and alphas are rewritten only where the input's would
    give a layer another rank or scale; settings of what was left out are switched off; an
    initialisation that would touch the new base weight or make noise becomes the default one.

    Args:
        adapter: the adapter to be written.
        base_model_name_or_path: the base model that it now belongs to.

    Returns:
        A new dictionary for ``adapter_config.json``.
    """
    config = dict(adapter.config)
    layers = adapter.layers.values()
    config["base_model_name_or_path"] = base_model_name_or_path
    config["revision"] = None
    config["inference_mode"] = True
    left_out: dict[str, Any] = {
        "use_dora": False,
        "modules_to_save": None,
        "bias": "none",
        "lora_bias": False,
        "target_parameters": None,
        "trainable_token_indices": None,
    }
    tables = [layer for layer in layers if layer.is_embedding]
    if not any(x.repeats(table) for table in tables for x in layers if not x.is_embedding):
        left_out["ensure_weight_tying"] = False
    config.update({key: off for key, off in left_out.items() if config.get(key)})
    if str(config.get("init_lora_weights", True)).lower() not in _HARMLESS_INITS:
        config["init_lora_weights"] = True
        nested: dict[str, Any] = {"loftq_config": {}, "corda_config": None, "lora_ga_config": None}
        config.update({key: off for key, off in nested.items() if config.get(key)})
    if not _describes(config, layers):
        config.update(_ranks_and_alphas(config, list(layers)))
    if _must_name_modules(adapter):
        config["target_modules"] = list(adapter.layers)
        redundant = ("exclude_modules", "layers_to_transform", "layers_pattern")
        config.update({key: None for key in redundant if config.get(key) is not None})
    return config


def _describes(config: dict[str, Any], layers: Iterable[LoraLayer]) -> bool:
    return all(
        layer_rank(config, layer.module) == layer.rank
        and layer_scale(config, layer.module, layer.rank) == layer.scale
        for layer in layers
    )


def _must_name_modules(adapter: Adapter) -> bool:
    targets = adapter.config.get("target_modules")
    if set(adapter.layers) != set(adapter.targets or adapter.layers):
        return True
    return not all(is_target_module(module, targets) for module in adapter.layers)


def _ranks_and_alphas(config: dict[str, Any], layers: list[LoraLayer]) -> dict[str, Any]:
    alphas = [_alpha_for(layer.scale, _divisor(config, layer.rank)) for layer in layers]
    (rank, alpha), _ = Counter(
        (layer.rank, alpha) for layer, alpha in zip(layers, alphas, strict=True)
    ).most_common(1)[0]

    def patterns(quote: bool) -> dict[str, Any]:
        def key(layer: LoraLayer) -> str:
            return f"^{re.escape(layer.module)}" if quote else layer.module

        pairs = list(zip(layers, alphas, strict=True))
        return {
            "r": rank,
            "lora_alpha": alpha,
            "rank_pattern": {key(x): x.rank for x, _ in pairs if x.rank != rank},
            "alpha_pattern": {key(x): a for x, a in pairs if a != alpha},
        }

    # A bare module path is what older PEFT releases and other readers understand, but as a
    # regular expression it can also match the end of a longer path.
    plain = patterns(quote=False)
    wanted = [(layer.rank, a) for layer, a in zip(layers, alphas, strict=True)]
    got = [
        (layer_rank(plain, x.module), _lookup(plain["alpha_pattern"], x.module, alpha))
        for x in layers
    ]
    return plain if got == wanted else patterns(quote=True)


def _alpha_for(scale: float, divisor: float) -> int | float:
    """The alpha for which ``alpha / divisor == scale``, a whole number where one will do.

    The quotient of doubles cannot reach every double; where it misses, the nearest alpha is
    returned, whose scale is off by one unit in the last place (1e-16).
    """
    alpha = scale * divisor
    if round(alpha) / divisor == scale:
        return round(alpha)
    for candidate in (alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)):
        if candidate / divisor == scale:
            return candidate
    return alpha
