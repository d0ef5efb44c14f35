# SPDX-License-Identifier: Apache-2.0
"""The header of a GGUF file: its metadata without the vocabulary, and where its tensors lie.

`gguf.GGUFReader` is not used: it builds a numpy view for every token and merge of the vocabulary
(5 s for a 135M model with 49 thousand tokens, where this takes 0.1 s) and maps the whole file.

Layout (little-endian): magic "GGUF", u32 version, u64 tensor count, u64 metadata count; then per
metadata item a string key, u32 type and value; then per tensor a string name, u32 number of sides,
u64 sides (innermost first), u32 type, u64 offset from the aligned end of the header.
"""

import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# ggml allows four sides; anything else is a misread.
MAX_SIDES = 4
DEFAULT_ALIGNMENT = 32


class TensorInfo(NamedTuple):
    """One tensor as the header gives it.

    Attributes:
        shape: outermost side first, as in torch.
        type_id: ggml's number of the storage type.
        offset: where its bytes begin in the file.
    """

    shape: tuple[int, ...]
    type_id: int
    offset: int


class Header(NamedTuple):
    """Metadata and tensors of a GGUF file.

    Attributes:
        metadata: values by key; keys under `tokenizer.` are left out.
        tensors: in file order, by GGUF name.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Reads the header of a GGUF file.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be read, is no GGUF file of a known version, or ends
            inside its header.
    """
    try:
        with path.open("rb", buffering=1 << 20) as file:
            return _Parser(file, path).header()
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    except (UnicodeDecodeError, struct.error) as error:
        raise CheckpointError(f"The GGUF header of {str(path)!r} is corrupt ({error}).") from error


class _Parser:
    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path, self.size = file, path, path.stat().st_size

    def header(self) -> Header:
        magic = self.file.read(4)
        if magic != MAGIC:
            raise CheckpointError(
                f"{str(self.path)!r} is not a GGUF file: it begins with {magic!r} instead of "
                f"{MAGIC!r}."
            )
        version = self.scalar("<I")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            what = "is big-endian" if big_endian else f"has version {version}"
            raise CheckpointError(
                f"The GGUF file {str(self.path)!r} {what}; little-endian files of version "
                f"{' and '.join(map(str, VERSIONS))} can be read, so convert the model again."
            )
        n_tensors, n_items = self.scalar("<Q"), self.scalar("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_items):
            key = self.string()
            kind = self.scalar("<I")
            # The vocabulary is most of the header and says nothing about the weights.
            if key.startswith("tokenizer."):
                self.skip_value(kind)
            else:
                metadata[key] = self.value(kind)
        infos = [self.tensor() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self.corrupt(f"alignment {alignment}")
        start = -(-self.file.tell() // alignment) * alignment
        tensors = {name: info._replace(offset=start + info.offset) for name, info in infos}
        if len(tensors) != len(infos):
            raise self.corrupt("two tensors of one name")
        return Header(metadata, tensors)

    def tensor(self) -> tuple[str, TensorInfo]:
        name = self.string()
        n_sides = self.scalar("<I")
        if n_sides > MAX_SIDES:
            raise self.corrupt(f"tensor {name!r} of {n_sides} sides")
        sides = [self.scalar("<Q") for _ in range(n_sides)]
        return name, TensorInfo(tuple(reversed(sides)), self.scalar("<I"), self.scalar("<Q"))

    def value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            item_kind, count = self.scalar("<I"), self.scalar("<Q")
            return [self.value(item_kind) for _ in range(count)]
        raise self.corrupt(f"metadata type {kind}")

    def skip_value(self, kind: int) -> None:
        if kind in SCALARS:
            self.skip(struct.calcsize(SCALARS[kind]))
        elif kind == STRING:
            self.skip(self.scalar("<Q"))
        elif kind == ARRAY:
            item_kind, count = self.scalar("<I"), self.scalar("<Q")
            if item_kind in SCALARS:
                self.skip(count * struct.calcsize(SCALARS[item_kind]))
            else:
                for _ in range(count):
                    self.skip_value(item_kind)
        else:
            raise self.corrupt(f"metadata type {kind}")

    def scalar(self, layout: str) -> Any:
        [value] = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8")

    def take(self, count: int) -> bytes:
        # Checked before reading: a corrupt length must not become an allocation.
        if count > self.size or len(data := self.file.read(count)) < count:
            raise self.truncated()
        return data

    def skip(self, count: int) -> None:
        # A seek beyond the end succeeds, and the next read would fail far from the cause.
        if count > self.size or self.file.seek(count, 1) > self.size:
            raise self.truncated()

    def truncated(self) -> CheckpointError:
        return CheckpointError(
            f"The GGUF file {str(self.path)!r} ends inside its header ({self.size} bytes); it is "
            "truncated, so download it again."
        )

    def corrupt(self, what: str) -> CheckpointError:
        return CheckpointError(f"The GGUF header of {str(self.path)!r} is corrupt: it has {what}.")
