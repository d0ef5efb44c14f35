# SPDX-License-Identifier: Apache-2.0
"""The native form of a LoRA-X adapter as files: a directory of cores and a configuration."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorax_transfer.adapters.lorax_form import (
    CORES,
    DIGEST_BYTES,
    FORMAT_VERSION,
    PEFT_TYPE,
    PROBES,
    check_convolution,
    core_shape,
    dense_core,
)
from lorax_transfer.adapters.peft import (
    CONFIG_FILE,
    check_directory,
    read_config,
    read_tensors,
    write_files,
)
from lorax_transfer.errors import AdapterError

PREFIX = "base_model.model."
_PARTS = ("weight", "probe", "digest")


@dataclass(frozen=True, eq=False)
class NativeLayer:
    """The core of one module, as stored.

    Args:
        module: module path inside the model.
        weight: the core, `(k,)`, `(k, k)` or `(2 w + 1, k)`.
        probe: `(2, k)`, see `lorax_form.probe`.
        digest: `(16,)` uint8, see `lorax_form.digest`.
    """

    module: str
    weight: torch.Tensor
    probe: torch.Tensor
    digest: torch.Tensor

    @property
    def rank(self) -> int:
        """Directions `k` of its bases."""
        return self.probe.shape[1]


@dataclass(frozen=True, eq=False)
class NativeAdapter:
    """A LoRA-X adapter as read from its files.

    Args:
        layers: cores by module path, in the order of the file.
        config: ``adapter_config.json``.
        metadata: metadata in the header of the tensor file.
        location: where it was read from.
        content_hash: ``"sha256:<hex>"`` of the tensor file.
    """

    layers: dict[str, NativeLayer]
    config: dict[str, Any]
    metadata: dict[str, str]
    location: Path
    content_hash: str

    def applied_core(self, weight: torch.Tensor) -> torch.Tensor:
        """What stands between the bases of a module: `scale * C`.

        Args:
            weight: its core in the signs of these bases.

        Returns:
            `(k, k)` float32.
        """
        return dense_core(weight.float(), self.config["core"]) * self.config["scale"]

    def check_foldable(self) -> None:
        """See to it that an ordinary LoRA can hold the update, as far as the file says.

        Raises:
            AdapterError: a convolution is dilated or padded with other than zeros.
        """
        for module, how in self.config.get("convolutions", {}).items():
            check_convolution(module, how)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of the file."""
        return {
            f"{PREFIX}{layer.module}.lora_core.{part}": getattr(layer, part)
            for layer in self.layers.values()
            for part in _PARTS
        }


def write_lorax(
    native: NativeAdapter,
    directory: Path,
    *,
    base_model_name_or_path: str,
    provenance: Mapping[str, str],
) -> list[str]:
    """Write configuration and tensors of an adapter into a directory.

    Args:
        native: what to write.
        directory: an existing directory.
        base_model_name_or_path: the base model that it belongs to.
        provenance: entries for the file's metadata, by short name.

    Returns:
        Names of the files written.
    """
    config = {
        **native.config,
        "base_model_name_or_path": base_model_name_or_path,
        "revision": None,
        "inference_mode": True,
    }
    tensors = {name: tensor.contiguous() for name, tensor in native.state_dict().items()}
    return write_files(directory, config, tensors, native.metadata, provenance)


def is_lorax(path: str | os.PathLike[str]) -> bool:
    """Whether a directory says that it holds a LoRA-X adapter in its native form."""
    try:
        config = json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == PEFT_TYPE


def read_lorax(path: str | os.PathLike[str]) -> NativeAdapter:
    """Read the native form of a LoRA-X adapter.

    Args:
        path: its directory.

    Returns:
        The adapter, on the CPU.

    Raises:
        AdapterError: if it is missing, broken, of another kind, or of a later version.
    """
    directory = Path(path)
    check_directory(directory)
    config = read_config(directory)
    _check_config(config, directory)
    tensors, metadata, content_hash = read_tensors(directory)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(PREFIX).rpartition(".lora_core.")
        if not module or part not in _PARTS:
            raise AdapterError(
                f"{directory} holds the tensor {name}, which is no part of a LoRA-X adapter; "
                "remove it from the file if the adapter does not need it."
            )
        parts.setdefault(module, {})[part] = tensor
    if not parts:
        raise AdapterError(f"{directory} holds no cores, expected one at least; save it again.")
    layers = {module: _layer(directory, config, module, found) for module, found in parts.items()}
    return NativeAdapter(layers, config, metadata, directory, content_hash)


def _check_config(config: dict[str, Any], directory: Path) -> None:
    kind, version = config.get("peft_type"), config.get("format_version")
    if kind != PEFT_TYPE:
        raise AdapterError(
            f"{directory} has peft_type {kind!r}, expected {PEFT_TYPE!r}: it is no LoRA-X adapter."
        )
    if version != FORMAT_VERSION:
        raise AdapterError(
            f"{directory} has format_version {version!r}, expected {FORMAT_VERSION}; read it with "
            "the version of lorax-transfer that wrote it."
        )
    numbers = ("scale", "bandwidth")
    if config.get("core") not in CORES or not all(_is_number(config.get(x)) for x in numbers):
        raise AdapterError(
            f"{directory / CONFIG_FILE} has core {config.get('core')!r}, scale "
            f"{config.get('scale')!r} and bandwidth "
            f"{config.get('bandwidth')!r}, expected one of {', '.join(CORES)} and two numbers; "
            "copy or save the adapter again."
        )
    _check_convolutions(config.get("convolutions", {}), directory / CONFIG_FILE)


def _check_convolutions(found: object, path: Path) -> None:
    of_all = list(found.values()) if isinstance(found, dict) else [None]
    if not all(
        isinstance(how, dict) and isinstance(how.get("dilation"), list) and how.get("padding_mode")
        for how in of_all
    ):
        raise AdapterError(
            f"{path} has convolutions {found!r}, expected dilation and padding_mode of each; copy "
            "or save the adapter again."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _layer(
    directory: Path, config: dict[str, Any], module: str, found: dict[str, torch.Tensor]
) -> NativeLayer:
    absent = [part for part in _PARTS if part not in found]
    if absent:
        raise AdapterError(
            f"{directory} holds no {absent[0]} for {module}, expected {', '.join(_PARTS)}; copy or "
            "save the adapter again."
        )
    layer = NativeLayer(module, **found)
    shape = core_shape(config["core"], layer.probe.shape[-1], config["bandwidth"])
    if (
        layer.probe.shape != (PROBES, layer.rank)
        or layer.digest.shape != (DIGEST_BYTES,)
        or layer.weight.shape != shape
    ):
        raise AdapterError(
            f"the core of {module} in {directory} has shape {tuple(layer.weight.shape)} with a "
            f"probe of {tuple(layer.probe.shape)}, expected {shape} for a {config['core']} core; "
            "copy or save the adapter again."
        )
    if not bool(layer.weight.isfinite().all()):
        raise AdapterError(
            f"the core of {module} in {directory} holds NaN or Inf, expected finite numbers; the "
            "training run that wrote it diverged, use an earlier checkpoint."
        )
    return layer
