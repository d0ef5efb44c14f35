# SPDX-License-Identifier: Apache-2.0
"""PEFT's tensor names: which module and which part of the adapter each one belongs to."""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

PREFIX = "base_model.model."

# Components that wrappers insert and that no module of a model is called.
_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# An adapter's name never holds a dot: it is a key of a ModuleDict.
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?\.weight")
_TABLE_FACTOR = re.compile(
    r"(?P<module>.+)\.lora_embedding_(?P<factor>[AB])(\.(?P<adapter>[^.]+))?"
)
_OTHER = {
    "dora": re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.[^.]+){0,2}"),
    "bias": re.compile(r"(?P<module>.+)\.(lora_B(\.[^.]+)?|base_layer)\.bias"),
    "trainable_tokens": re.compile(
        r"(?P<module>.+?)(\.token_adapter)?\.trainable_tokens_(delta|original)(\.[^.]+)?"
    ),
}
_FULL_COPY = re.compile(
    r"(?P<module>.+?)\.(base_layer\.weight|(original_module|modules_to_save)\..+)"
)
# Written whole when the vocabulary was resized, without being listed in modules_to_save.
_EMBEDDINGS = re.compile(
    r"(?P<module>(.+\.)?(embed_tokens|lm_head|wte|word_embeddings|embed_in|embed_out))"
    r"\.(weight|bias)"
)


class TensorName(NamedTuple):
    """What a tensor's name says.

    Args:
        role: ``"lora_A"``, ``"lora_B"``, ``"lora_embedding_A"``, ``"lora_embedding_B"``, a kind of
            `lorax_transfer.adapters.kinds.DROPPABLE`, or ``"unknown"``.
        module: module path; the whole name where the role is unknown.
        adapter: the adapter name inside the tensor's name, e.g. ``"default"``, or None.
    """

    role: str
    module: str
    adapter: str | None = None


def strip_prefixes(names: Iterable[str]) -> dict[str, str]:
    """Take off what PEFT and training wrappers put around the module path.

    ``base_model.model.`` goes from the start however often it is repeated; ``_orig_mod``
    (torch.compile), ``_fsdp_wrapped_module`` and ``_checkpoint_wrapped_module`` go wherever they
    stand. ``module.`` (DistributedDataParallel) is a word that a model may use too, so it goes
    from the start only where every name has it.

    Args:
        names: the tensor names of one file.

    Returns:
        The shortened name for each name, in the same order.

    Example:
        >>> strip_prefixes(["module.base_model.model._orig_mod.fc.lora_A.weight"])
        {'module.base_model.model._orig_mod.fc.lora_A.weight': 'fc.lora_A.weight'}
    """
    short = {}
    for name in names:
        short[name] = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
    while True:
        peeled = {name: _peel(rest) for name, rest in short.items()}
        if peeled and all(rest.startswith("module.") for rest in peeled.values()):
            peeled = {name: rest.removeprefix("module.") for name, rest in peeled.items()}
        if peeled == short:
            return short
        short = peeled


def _peel(name: str) -> str:
    while name.startswith(PREFIX):
        name = name.removeprefix(PREFIX)
    return name


def parse_name(name: str, config: dict[str, Any]) -> TensorName:
    """Read one shortened tensor name.

    Args:
        name: a value of `strip_prefixes`.
        config: the adapter's configuration; it says which modules were saved whole and which
            expert parameters were targeted.

    Returns:
        Its role, module and adapter name.

    Example:
        >>> parse_name("fc.lora_B.default.weight", {})
        TensorName(role='lora_B', module='fc', adapter='default')
    """
    if match := _FACTOR.fullmatch(name):
        module = match["module"]
        # A wrapper inside a wrapper: PEFT nests them only to adapt several bare parameters.
        if module.endswith(".base_layer"):
            return TensorName("experts", re.sub(r"(\.base_layer)+$", "", module))
        if _holds_target_parameter(module, config):
            return TensorName("experts", module)
        return TensorName(f"lora_{match['factor']}", module, match["adapter"])
    if match := _TABLE_FACTOR.fullmatch(name):
        return TensorName(f"lora_embedding_{match['factor']}", match["module"], match["adapter"])
    for kind, pattern in _OTHER.items():
        if match := pattern.fullmatch(name):
            return TensorName(kind, match["module"])
    if _is_saved_whole(name, config):
        return TensorName("modules_to_save", name.rpartition(".")[0])
    for pattern in (_FULL_COPY, _EMBEDDINGS):
        if match := pattern.fullmatch(name):
            return TensorName("modules_to_save", match["module"])
    # bias="all" saves the bias of every module; before modules were wrapped, "lora_only" did not
    # write base_layer either.
    if config.get("bias") in ("all", "lora_only") and (name == "bias" or name.endswith(".bias")):
        return TensorName("bias", name.rpartition(".")[0])
    return TensorName("unknown", name)


def _is_saved_whole(name: str, config: dict[str, Any]) -> bool:
    saved = config.get("modules_to_save") or ()
    return any(f".{module}." in f".{name}" for module in saved)


def _holds_target_parameter(module: str, config: dict[str, Any]) -> bool:
    for parameter in config.get("target_parameters") or ():
        parent = parameter.rpartition(".")[0]
        if parent:
            if f".{module}".endswith(f".{parent}"):
                return True
        elif not is_target_module(module, config.get("target_modules")):
            # A bare parameter name fits any module, so what target_modules names comes first.
            return True
    return False


def is_target_module(module: str, targets: str | list[str] | None) -> bool:
    """Whether ``target_modules`` names a module, by PEFT's rule.

    Args:
        module: module path.
        targets: a regular expression, ``"all-linear"``, or a list of paths or ends of paths.

    Returns:
        True if it is named; ``"all-linear"`` names every module.
    """
    if isinstance(targets, str):
        return targets == "all-linear" or re.fullmatch(targets, module) is not None
    return any(f".{module}".endswith(f".{target}") for target in targets or ())
