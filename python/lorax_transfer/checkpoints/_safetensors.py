# SPDX-License-Identifier: Apache-2.0
"""Reader of one or several .safetensors files.

The container is 8 bytes of header length, a JSON header, then the raw tensors. It is read with
plain reads and not through `safetensors.safe_open`, which maps the file and hands out views of the
mapping: their pages count as resident memory for as long as any of them lives.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..errors import CheckpointError
from ._base import Checkpoint, read_into, read_json

# The format's own limit, so that a corrupt length cannot ask for the whole memory.
MAX_HEADER_BYTES = 100_000_000

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class Entry(NamedTuple):
    """Where one tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class SafetensorsCheckpoint(Checkpoint):
    """Tensors of one .safetensors file, or of the shards of an index."""

    format = "safetensors"

    def __init__(self, files: list[Path], weight_map: Mapping[str, str] | None = None) -> None:
        """Reads the header of every file.

        Args:
            files: the .safetensors files, in order.
            weight_map: tensor name to file name, from the index of a sharded checkpoint; every
                tensor in it has to be in the file that it names.

        Raises:
            CheckpointError: a file is missing, truncated or no safetensors, or differs from the
                index.
        """
        super().__init__(files)
        self._entries: dict[str, Entry] = {}
        headers = {path.name: read_header(path) for path in files}
        for name, file_name in (weight_map or {}).items():
            if name not in headers[file_name]:
                raise CheckpointError(
                    f"The index says that {name!r} is in {file_name!r}, but it is not there; "
                    "index and shards come from different versions, so download them again."
                )
        for file_name, header in headers.items():
            for name, entry in header.items():
                # A tensor that the index places elsewhere is a stale copy; one that it does not
                # mention is kept.
                if weight_map is None or weight_map.get(name, file_name) == file_name:
                    self._entries[name] = entry

    def names(self) -> list[str]:
        """Returns the name of every tensor, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that `read(name)` will have."""
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype of a tensor, as stored."""
        return self._entry(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor, as stored."""
        self._check_open()
        entry = self._entry(name)
        flat = torch.empty(entry.n_bytes, dtype=torch.uint8)
        try:
            with entry.path.open("rb", buffering=0) as file:
                file.seek(entry.offset)
                read_into(file, flat.numpy().data, entry.path)
        except OSError as error:
            raise CheckpointError(f"Cannot read {str(entry.path)!r}: {error.strerror}.") from error
        return flat.view(entry.dtype).reshape(entry.shape)

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise self._unknown(name) from None


def read_index(path: Path) -> dict[str, str]:
    """Reads the index of a sharded checkpoint.

    Args:
        path: a `*.safetensors.index.json`.

    Returns:
        Tensor name to the name of the file that holds it, beside the index.

    Raises:
        CheckpointError: the file is no such index, or it names a file elsewhere.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(
            f"The index {str(path)!r} has no weight_map, so it does not say which file holds which "
            "tensor; download it again."
        )
    for name, shard in weight_map.items():
        # An index comes from elsewhere: it must not lead out of its directory.
        if not isinstance(shard, str) or not shard or Path(shard).name != shard:
            raise CheckpointError(
                f"The index {str(path)!r} puts {name!r} into {shard!r}; a file name beside the "
                "index was expected."
            )
    return weight_map


def read_header(path: Path) -> dict[str, Entry]:
    """Reads and checks the header of one .safetensors file.

    Args:
        path: the file.

    Returns:
        The tensors by name, in the order of their bytes.

    Raises:
        CheckpointError: the file is missing, truncated or not a safetensors file.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            n_header = int.from_bytes(file.read(8), "little")
            if size < 8 or n_header > min(size - 8, MAX_HEADER_BYTES):
                raise CheckpointError(
                    f"{str(path)!r} is not a safetensors file or its header is cut off "
                    f"({size} bytes, header length {n_header}); download it again."
                )
            raw = file.read(n_header)
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = {name: _entry(path, name, item, 8 + n_header) for name, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"The header of {str(path)!r} is not that of a safetensors file ({error})."
        ) from error
    ordered = sorted(entries.items(), key=lambda pair: (pair[1].offset, pair[1].n_bytes))
    end = 8 + n_header
    for name, entry in ordered:
        if entry.offset != end:
            raise CheckpointError(
                f"The header of {str(path)!r} puts {name!r} at byte {entry.offset} where {end} was "
                "expected; the file is corrupt, so download it again."
            )
        end = entry.offset + entry.n_bytes
    if end != size:
        raise CheckpointError(
            f"{str(path)!r} should have {end} bytes by its header, but has {size}; it is truncated "
            "or corrupt, so download it again."
        )
    return dict(ordered)


def _entry(path: Path, name: str, item: dict[str, Any], start: int) -> Entry:
    kind = item["dtype"]
    if kind not in DTYPES:
        raise CheckpointError(
            f"{name!r} in {str(path)!r} has dtype {kind}, which cannot be read; known are "
            f"{', '.join(DTYPES)}."
        )
    shape = tuple(int(side) for side in item["shape"])
    first, last = (int(offset) for offset in item["data_offsets"])
    n_bytes = math.prod(shape) * DTYPES[kind].itemsize
    if min(shape, default=0) < 0 or last - first != n_bytes:
        raise CheckpointError(
            f"{name!r} in {str(path)!r} has shape {list(shape)} of {kind}, {n_bytes} bytes, but "
            f"the header gives it {last - first}; the file is corrupt, so download it again."
        )
    return Entry(path, DTYPES[kind], shape, start + first, n_bytes)
