# SPDX-License-Identifier: Apache-2.0
"""Reader of a GGUF file, back under Hugging Face's names and in its layout."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import CheckpointError
from ._base import Checkpoint, read_into
from ._gguf_header import Header, TensorInfo, read_header
from ._gguf_names import ARCHITECTURES, Tensor, translate

if TYPE_CHECKING:
    import gguf

# Quantised bytes expanded at a time. The package's dequantisers use several float32 temporaries of
# the piece's size, which this keeps to some tens of MB whatever the tensor's size.
CHUNK_BYTES = 1 << 20

PLAIN_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

# GGUF metadata (after the architecture's name) -> key in Hugging Face's config.json.
CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "vocab_size": "vocab_size",
}


class Entry(NamedTuple):
    """One tensor: where it lies, how it is stored, what it stands for."""

    info: TensorInfo
    kind: "gguf.GGMLQuantizationType"
    n_bytes: int
    meaning: Tensor


class GgufCheckpoint(Checkpoint):
    """Tensors of one GGUF file.

    Floating tensors keep their dtype; quantised ones are expanded to float32. A tensor that has no
    counterpart in the Hugging Face model (stacked experts, rope factors) keeps its GGUF name.
    """

    format = "gguf"

    def __init__(self, path: Path) -> None:
        """Reads the header.

        Args:
            path: the file.

        Raises:
            CheckpointError: the package `gguf` is missing, or the file is no complete GGUF file of
                a known architecture.
        """
        super().__init__([path])
        self._path = path
        header = read_header(path)
        self._metadata = header.metadata
        self._architecture = _architecture(header, path)
        self._rules = ARCHITECTURES[self._architecture]
        package = _gguf_package()
        size = path.stat().st_size
        self._entries: dict[str, Entry] = {}
        for name, info in header.tensors.items():
            kind, n_bytes = _storage(package, path, name, info)
            if info.offset + n_bytes > size:
                raise CheckpointError(
                    f"The GGUF file {str(path)!r} ends inside tensor {name!r} ({size} bytes, "
                    f"{info.offset + n_bytes} expected); it is truncated, so download it again."
                )
            meaning = translate(self._rules, name)
            self._entries[meaning.name] = Entry(info, kind, n_bytes, meaning)

    def names(self) -> list[str]:
        """Returns the name of every tensor, in file order."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that `read(name)` will have."""
        entry = self._entry(name)
        return entry.info.shape[::-1] if entry.meaning.is_transposed else entry.info.shape

    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype that `read(name)` will have: float32 for a quantised tensor."""
        return PLAIN_DTYPES.get(self._entry(name).kind.name, torch.float32)

    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor, expanded and with the conversion undone."""
        self._check_open()
        entry = self._entry(name)
        try:
            values = self._stored(entry)
        except OSError as error:
            raise CheckpointError(f"Cannot read {str(self._path)!r}: {error.strerror}.") from error
        meaning = entry.meaning
        if meaning.permuted is not None:
            heads = self._heads(meaning.permuted, meaning.block or 0)
            _split_pairs(values, heads, name)
        if meaning.shift:
            # In float32 first: 1 + w rounds to a different grid than w does.
            values = (values.float() + meaning.shift).to(values.dtype)
        if meaning.is_transposed:
            values = values.T.contiguous()
        return values

    def _header_config(self) -> dict[str, Any]:
        config: dict[str, Any] = {
            "architecture": self._architecture,
            "model_type": self._rules.model_type,
        }
        for key, hf_key in CONFIG_KEYS.items():
            value = self._metadata.get(f"{self._architecture}.{key}")
            if value is not None:
                config[hf_key] = value
        # Converters leave it out where every query head has its own keys.
        if "num_attention_heads" in config:
            config.setdefault("num_key_value_heads", config["num_attention_heads"])
        embedding = self._entries.get(f"{self._rules.top['token_embd']}.weight")
        if embedding is not None:
            config.setdefault("vocab_size", embedding.info.shape[0])
        # Encoders have no head that could be tied.
        if "output_norm" in self._rules.top:
            config["tie_word_embeddings"] = "lm_head.weight" not in self._entries
        return config

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise self._unknown(name) from None

    def _stored(self, entry: Entry) -> torch.Tensor:
        with self._path.open("rb", buffering=0) as file:
            file.seek(entry.info.offset)
            plain = PLAIN_DTYPES.get(entry.kind.name)
            if plain is not None:
                flat = torch.empty(entry.n_bytes, dtype=torch.uint8)
                read_into(file, flat.numpy().data, self._path)
                return flat.view(plain).reshape(entry.info.shape)
            package = _gguf_package()
            n_rows = math.prod(entry.info.shape[:-1])
            values = torch.empty(n_rows, entry.info.shape[-1])
            row_bytes = entry.n_bytes // max(n_rows, 1)
            step = max(1, CHUNK_BYTES // max(row_bytes, 1))
            chunk = torch.empty(min(step, n_rows) * row_bytes, dtype=torch.uint8).numpy()
            for first in range(0, n_rows, step):
                piece = chunk[: min(step, n_rows - first) * row_bytes].reshape(-1, row_bytes)
                read_into(file, piece.reshape(-1).data, self._path)
                try:
                    rows = package.dequantize(piece, entry.kind)
                except NotImplementedError as error:
                    raise CheckpointError(
                        f"{entry.meaning.name!r} is stored as {entry.kind.name}, which the "
                        "installed gguf package cannot expand; upgrade it, or convert the model "
                        "to F16."
                    ) from error
                values[first : first + len(piece)] = torch.from_numpy(rows)
        return values.reshape(entry.info.shape)

    def _heads(self, role: str, block: int) -> int:
        keys = [f"{self._architecture}.attention.head_count"]
        if role == "attn_k":
            keys.insert(0, f"{self._architecture}.attention.head_count_kv")
        for key in keys:
            heads = self._metadata.get(key)
            # Some models give one number per layer.
            if isinstance(heads, list):
                heads = heads[block] if block < len(heads) else None
            if isinstance(heads, int) and heads > 0:
                return heads
        raise CheckpointError(
            f"The GGUF file {str(self._path)!r} does not give {keys[-1]}, without which the row "
            "order of q and k cannot be restored; convert the model again."
        )


def _split_pairs(values: torch.Tensor, heads: int, name: str) -> None:
    """Restores rows (2, dim / 2) per head from the stored (dim / 2, 2), in place.

    One head at a time, so that no second copy of the matrix is made.
    """
    rows = values.shape[0]
    if rows % (2 * heads):
        raise CheckpointError(
            f"{name!r} has {rows} rows, which {heads} heads of an even width cannot have; the "
            "GGUF file's head count is wrong, so convert the model again."
        )
    for head in values.view(heads, rows // heads, -1):
        pairs = head.view(head.shape[0] // 2, 2, -1)
        head.copy_(pairs.transpose(0, 1).reshape(head.shape))


def _architecture(header: Header, path: Path) -> str:
    name = header.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"The GGUF file {str(path)!r} has architecture {name!r}, whose conversion cannot be "
            f"undone yet; known are {', '.join(sorted(ARCHITECTURES))}. Use the model's "
            "safetensors instead."
        )
    if header.metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{str(path)!r} is one part of {header.metadata['split.count']}; join them with "
            "`llama-gguf-split --merge` and name the result."
        )
    return str(name)


def _storage(
    package: Any, path: Path, name: str, info: TensorInfo
) -> tuple["gguf.GGMLQuantizationType", int]:
    try:
        kind = package.GGMLQuantizationType(info.type_id)
        block, block_bytes = package.GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{name!r} in {str(path)!r} has storage type {info.type_id}, which the installed gguf "
            "package does not know; upgrade it with `pip install -U gguf`."
        ) from error
    row = info.shape[-1] if info.shape else 1
    if row % block:
        raise CheckpointError(
            f"{name!r} in {str(path)!r} has rows of {row} values, no multiple of "
            f"{kind.name}'s block of {block}; the file is corrupt, so download it again."
        )
    return kind, math.prod(info.shape) // block * block_bytes


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            'Reading a GGUF file needs the package gguf: pip install "lorax-kernels[transfer]".'
        ) from error
    return gguf
