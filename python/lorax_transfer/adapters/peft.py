# SPDX-License-Identifier: Apache-2.0
"""The PEFT format: a directory of ``adapter_config.json`` and ``adapter_model.safetensors``."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lorax_transfer.adapters.adapter import Adapter, LoraLayer
from lorax_transfer.adapters.kinds import DROPPABLE, refuse
from lorax_transfer.adapters.peft_config import (
    check_config,
    config_kinds,
    layer_rank,
    layer_scale,
    output_config,
)
from lorax_transfer.adapters.peft_names import PREFIX, TensorName, parse_name, strip_prefixes
from lorax_transfer.errors import AdapterError, OutputError

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
_PICKLE_FILE = "adapter_model.bin"
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_PROVENANCE = "lorax_transfer."

# What PEFT calls the two factors of a layer, and of an embedding table, where they are those of the
# transposed table.
_LAYER = ("lora_A", "lora_B")
_TABLE = ("lora_embedding_A", "lora_embedding_B")


def is_peft(path: Path) -> bool:
    """Whether a directory holds a PEFT adapter, or the remains of one."""
    return any((path / name).is_file() for name in (CONFIG_FILE, TENSOR_FILE, _PICKLE_FILE))


def read_peft(path: Path, drop: frozenset[str]) -> Adapter:
    """Read a PEFT LoRA directory.

    Args:
        path: the directory.
        drop: kinds of content to leave out instead of refusing them.

    Returns:
        The adapter, its factors in their own dtype on the CPU.

    Raises:
        AdapterError: if anything is missing, broken, unknown, or refused.
    """
    config = read_config(path)
    check_config(config, path)
    tensors, metadata, content_hash = read_tensors(path)
    names = {
        name: parse_name(short, config) for name, short in strip_prefixes(tensors.keys()).items()
    }
    dropped, kinds = _sort_out(path, names, config, drop)
    pairs = _pair_factors(path, {name: names[name] for name in names if name not in dropped})
    layers = {module: _layer(path, config, module, pair, tensors) for module, pair in pairs.items()}
    if not layers:
        rest = f"after leaving out {', '.join(kinds)}" if kinds else "at all"
        raise AdapterError(
            f"{path} holds no lora_A and lora_B tensors {rest}, expected at least one pair; check "
            "that this is the adapter you mean."
        )
    adapted = {*_LAYER, *_TABLE, "experts"}
    return Adapter(
        layers=layers,
        config=config,
        metadata=metadata,
        location=path,
        dropped=dropped,
        content_hash=content_hash,
        dropped_kinds=kinds,
        targets=tuple(dict.fromkeys(n.module for n in names.values() if n.role in adapted)),
    )


def check_directory(directory: Path) -> None:
    """Raise AdapterError if there is no such directory."""
    if not directory.exists():
        raise AdapterError(
            f"{directory} does not exist, expected a directory with {CONFIG_FILE} and "
            f"{TENSOR_FILE}; check the path."
        )
    if not directory.is_dir():
        raise AdapterError(
            f"{directory} is a file, expected the directory that holds it and {CONFIG_FILE}; pass "
            f"{directory.absolute().parent}."
        )


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in an adapter's directory; AdapterError if it is missing or broken."""
    file = path / CONFIG_FILE
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise AdapterError(
            f"{path} has no {CONFIG_FILE}, expected it beside the tensors; without it the scale of "
            "the adapter is unknown."
        ) from error
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{file} cannot be read as JSON ({error}); copy or save the adapter again."
        ) from error
    if not isinstance(config, dict):
        raise AdapterError(
            f"{file} holds a {type(config).__name__}, expected a JSON object; save the adapter "
            "again."
        )
    return config


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Tensors, metadata and hash of an adapter's file; AdapterError if it is not safetensors."""
    file = path / TENSOR_FILE
    if not file.is_file():
        if (path / _PICKLE_FILE).is_file():
            raise AdapterError(
                f"{path} holds only a pickle, {_PICKLE_FILE}, which is not opened; convert it "
                "where you trust it: load it with peft and call save_pretrained(directory, "
                "safe_serialization=True)."
            )
        raise AdapterError(
            f"{path} has no {TENSOR_FILE}, expected it beside {CONFIG_FILE}; copy or save the "
            "adapter again."
        )
    try:
        magic, digest = _digest(file)
        # A safetensors header of 640 bytes starts like a pickle; its ninth byte tells them apart.
        if magic.startswith(_PICKLE_MAGIC) and magic[8:9] != b"{":
            raise AdapterError(
                f"{file} is a pickle in spite of its name and is not opened; convert it where you "
                "trust it, with safetensors.torch.save_file."
            )
        with safe_open(file, framework="pt") as handle:
            # Cloned, so that nothing depends on the file once it is closed.
            loaded = {name: handle.get_tensor(name).clone() for name in handle.keys()}  # noqa: SIM118
            metadata = dict(handle.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise AdapterError(
            f"{file} is not a complete safetensors file ({error}); copy or save the adapter again."
        ) from error
    header = _read_header(file)
    order = sorted(loaded, key=lambda name: header[name]["data_offsets"])
    return {name: loaded[name] for name in order}, metadata, f"sha256:{digest}"


def _digest(file: Path) -> tuple[bytes, str]:
    """The first bytes of a file and the sha256 of all of it."""
    digest = hashlib.sha256()
    magic = b""
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            magic = magic or chunk[:9]
            digest.update(chunk)
    return magic, digest.hexdigest()


def _sort_out(
    path: Path, names: Mapping[str, TensorName], config: dict[str, Any], drop: frozenset[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The tensors to leave out and their kinds; an error for what is unknown or not dropped."""
    unknown = [name for name, parsed in names.items() if parsed.role == "unknown"]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise AdapterError(
            f"{path} holds the tensor {unknown[0]}{more}, which is no part of a PEFT LoRA that "
            "this package knows; remove it from the file if the adapter does not need it."
        )
    shows = config_kinds(config)
    kinds = {n: "embedding" if x.role in _TABLE else x.role for n, x in names.items()}
    for name, kind in kinds.items():
        shows.setdefault(kind, []).append(name)
    found = {
        kind: shows[kind]
        for kind, about in DROPPABLE.items()
        if kind in shows and (kind in drop or not about.is_carried)
    }
    refused = {kind: shown for kind, shown in found.items() if kind not in drop}
    if refused:
        raise refuse(path, refused)
    dropped = tuple(name for name, kind in kinds.items() if kind in found)
    return dropped, tuple(found)


def _pair_factors(path: Path, names: Mapping[str, TensorName]) -> dict[str, dict[str, str]]:
    pairs: dict[str, dict[str, str]] = {}
    adapters: dict[str | None, str] = {}
    for name, parsed in names.items():
        adapters.setdefault(parsed.adapter, name)
        if len(adapters) > 1:
            first, second = adapters.values()
            raise AdapterError(
                f"{path} holds two adapters in one file ({first}, {second}), expected one; save "
                "each in a directory of its own."
            )
        pair = pairs.setdefault(parsed.module, {})
        if parsed.role in pair:
            raise AdapterError(
                f"{path} holds {parsed.role} of {parsed.module} twice ({pair[parsed.role]}, "
                f"{name}), expected it once; remove one of them."
            )
        pair[parsed.role] = name
    for module, pair in pairs.items():
        wanted = _TABLE if _TABLE[0] in pair or _TABLE[1] in pair else _LAYER
        if set(pair) != set(wanted):
            missing = [role for role in wanted if role not in pair]
            raise AdapterError(
                f"{path} holds {', '.join(sorted(pair))} of {module}"
                + (f" but not {missing[0]}" if missing else "")
                + f", expected {' and '.join(wanted)}; copy or save the adapter again."
            )
    return pairs


def _layer(
    path: Path,
    config: dict[str, Any],
    module: str,
    pair: Mapping[str, str],
    tensors: Mapping[str, torch.Tensor],
) -> LoraLayer:
    is_embedding = _TABLE[0] in pair
    lora_A, lora_B = (tensors[pair[role]] for role in (_TABLE if is_embedding else _LAYER))
    if is_embedding:
        # Laid out as those of a tied output layer are, so that both come out the same bit for bit.
        lora_A, lora_B = (x.transpose(0, -1).contiguous() for x in (lora_B, lora_A))
    # Shapes and dtypes first: they are LoraLayer's to check, and the scale needs a rank.
    layer = LoraLayer(module, lora_A, lora_B, scale=1.0, is_embedding=is_embedding)
    rank = layer_rank(config, module)
    if rank != layer.rank:
        raise AdapterError(
            f"{path} says rank {rank} for {module} but its tensors have rank {layer.rank}, "
            f"expected the same; correct r or rank_pattern in {CONFIG_FILE}."
        )
    for name in pair.values():
        if not torch.isfinite(tensors[name]).all():
            raise AdapterError(
                f"{name} of {path} holds NaN or Inf, expected finite numbers; the training run "
                "that wrote it diverged, use an earlier checkpoint."
            )
    return replace(layer, scale=layer_scale(config, module, layer.rank))


def write_peft(
    adapter: Adapter,
    directory: Path,
    *,
    base_model_name_or_path: str,
    provenance: Mapping[str, str],
    dtype: torch.dtype | None,
) -> list[str]:
    """Write configuration and tensors of an adapter into a directory.

    Args:
        adapter: what to write.
        directory: an existing directory.
        base_model_name_or_path: the base model it now belongs to.
        provenance: entries for the file's metadata, by short name.
        dtype: dtype of the factors; None leaves each as it is.

    Returns:
        Names of the files written.

    Raises:
        OutputError: if a factor does not fit into dtype.
    """
    config = output_config(adapter, base_model_name_or_path)
    tensors = _output_tensors(adapter.layers.values(), dtype)
    return write_files(directory, config, tensors, adapter.metadata, provenance)


def write_files(
    directory: Path,
    config: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    metadata: Mapping[str, str],
    provenance: Mapping[str, str],
) -> list[str]:
    """Write the two files of an adapter of any kind into a directory.

    Args:
        directory: an existing directory.
        config: the configuration.
        tensors: contiguous tensors that share no memory, by name.
        metadata: entries for the header of the tensor file.
        provenance: further ones, by short name.

    Returns:
        Names of the files written.
    """
    text = json.dumps(config, indent=2, sort_keys=True)
    (directory / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    header = {**metadata, "format": "pt"}
    for key, value in provenance.items():
        # A command line can hold a file name that is not Unicode.
        clean = str(value).encode(errors="backslashreplace").decode()
        header[_PROVENANCE + key.removeprefix(_PROVENANCE)] = clean
    file = directory / TENSOR_FILE
    save_file(tensors, file, metadata=header)
    _sort_metadata(file)
    # safetensors makes files that only their owner may read, whatever the umask says.
    file.chmod((directory / CONFIG_FILE).stat().st_mode)
    return [CONFIG_FILE, TENSOR_FILE]


def _output_tensors(
    layers: Iterable[LoraLayer], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for layer in layers:
        for role, tensor in _named_factors(layer):
            out = tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
            if not torch.isfinite(out).all():
                name = role.removesuffix(".weight")
                raise OutputError(
                    f"{name} of {layer.module} is not finite as {out.dtype}, expected values that "
                    "fit; write it as bf16 or fp32 (--dtype)."
                )
            storage = out.untyped_storage()
            # safetensors refuses tensors that share memory or are part of a larger one.
            if storage.data_ptr() in storages or storage.nbytes() != out.nbytes:
                out = out.clone()
            storages.add(out.untyped_storage().data_ptr())
            tensors[f"{PREFIX}{layer.module}.{role}"] = out
    return tensors


def _named_factors(layer: LoraLayer) -> list[tuple[str, torch.Tensor]]:
    if layer.is_embedding:
        return [(_TABLE[0], layer.lora_B.T), (_TABLE[1], layer.lora_A.T)]
    return [(f"{_LAYER[0]}.weight", layer.lora_A), (f"{_LAYER[1]}.weight", layer.lora_B)]


def _read_header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return json.loads(stream.read(int.from_bytes(stream.read(8), "little")))


def _sort_metadata(file: Path) -> None:
    """Put the header's metadata in order: safetensors writes it in another one each time."""
    header = _read_header(file)
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if len(text) <= size:
            stream.write(text.ljust(size))
