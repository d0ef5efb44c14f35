# SPDX-License-Identifier: Apache-2.0
"""What every reader of base weights offers, whatever its format."""

import difflib
import hashlib
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from ..errors import CheckpointError

HASH_CHUNK = 4 << 20
SHA256_NAME = re.compile(r"[0-9a-f]{64}")


class Checkpoint(ABC):
    """The weights of one base model, read a tensor at a time.

    Opening reads headers only. Files are opened for each read and closed after it, so that no
    mapping keeps them resident; one checkpoint may be read from several threads.

    Attributes:
        location: what the user named: an absolute path, or a hub id such as `org/name`.
        revision: the commit of the Hugging Face snapshot that is read; None for other paths.
        format: "safetensors" or "gguf".

    Example:
        >>> with open_checkpoint("path/to/model") as base:  # doctest: +SKIP
        ...     for name in base.names():
        ...         print(name, base.shape(name), base.dtype(name))
        ...     weight = base.read("model.layers.0.self_attn.q_proj.weight")
    """

    format: str

    def __init__(self, files: Sequence[Path]) -> None:
        """Keeps the weight files; a subclass reads their headers.

        Args:
            files: the files that hold the weights.
        """
        self.location = os.path.abspath(files[0])
        self.revision: str | None = None
        self._files = list(files)
        self._hash: str | None = None
        self._closed = False

    @abstractmethod
    def names(self) -> list[str]:
        """Returns the name of every tensor, in file order."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape that `read(name)` will have.

        Args:
            name: one of `names()`.

        Raises:
            CheckpointError: there is no such tensor.
        """

    @abstractmethod
    def dtype(self, name: str) -> torch.dtype:
        """Returns the dtype that `read(name)` will have (float32 for a quantised tensor).

        Args:
            name: one of `names()`.

        Raises:
            CheckpointError: there is no such tensor.
        """

    @abstractmethod
    def read(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Args:
            name: one of `names()`.

        Returns:
            A contiguous CPU tensor that owns its memory, laid out as in the Hugging Face model:
            (out, in) for a linear layer, (in, out) for GPT-2's Conv1D.

        Raises:
            CheckpointError: there is no such tensor, or its bytes cannot be read.
        """

    def files(self) -> list[Path]:
        """Returns the files that hold the weights: those that `content_hash` covers."""
        return list(self._files)

    def content_hash(self) -> str:
        """Returns what identifies the weights by content, wherever they lie.

        One file gives the SHA-256 of its bytes. Several give the SHA-256 of their sorted
        (name, SHA-256) pairs, one `name<tab>digest<newline>` line each. Files are read in chunks;
        a blob of the Hugging Face cache is named by its SHA-256 already, and that name is used.

        Returns:
            "sha256:" and 64 hexadecimal digits.

        Raises:
            CheckpointError: a file cannot be read.
        """
        if self._hash is None:
            digests = {path.name: file_sha256(path) for path in self._files}
            if len(digests) == 1:
                [digest] = digests.values()
            else:
                lines = "".join(f"{name}\t{digests[name]}\n" for name in sorted(digests))
                digest = hashlib.sha256(lines.encode()).hexdigest()
            self._hash = f"sha256:{digest}"
        return self._hash

    def config(self) -> dict[str, Any]:
        """Returns the model's configuration.

        Returns:
            `config.json` beside the weights if there is one, else what the file's own header tells
            under Hugging Face's key names, else an empty dictionary.

        Raises:
            CheckpointError: `config.json` is not a JSON object.
        """
        path = self._files[0].parent / "config.json"
        if path.is_file():
            return read_json(path)
        return self._header_config()

    def _header_config(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Ends the use of this checkpoint: a later `read` raises."""
        self._closed = True

    def __enter__(self) -> "Checkpoint":
        """Returns the checkpoint itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the checkpoint."""
        self.close()

    def __repr__(self) -> str:
        """Shows format, location and size."""
        return f"<Checkpoint {self.format} {self.location!r}, {len(self.names())} tensors>"

    def _check_open(self) -> None:
        if self._closed:
            raise CheckpointError(
                f"The checkpoint {self.location!r} was closed; open it again to read from it."
            )

    def _unknown(self, name: str) -> CheckpointError:
        names = self.names()
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; the nearest names are {', '.join(near)}" if near else f" ({len(names)} tensors)"
        return CheckpointError(f"No tensor {name!r} in {self.location!r}{hint}.")


def file_sha256(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes, 64 hexadecimal digits.

    Args:
        path: the file. A blob of the Hugging Face cache that is named by its SHA-256 is not read.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and SHA256_NAME.fullmatch(real.name):
        return real.name
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    except ValueError as error:
        raise CheckpointError(f"{str(path)!r} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{str(path)!r} should hold a JSON object, but holds a {type(content).__name__}."
        )
    return content


def read_into(file: BinaryIO, buffer: memoryview, path: Path) -> None:
    """Fills a buffer from an unbuffered file.

    One read returns at most 2 GiB on Linux, less than a large embedding takes, hence the loop.

    Args:
        file: an open binary file, at the right offset.
        buffer: writable bytes.
        path: the file's path, for the message.

    Raises:
        CheckpointError: the file ends first: it has shrunk since it was opened.
    """
    done = 0
    while done < len(buffer):
        count = file.readinto(buffer[done:])  # type: ignore[attr-defined]
        if not count:
            raise CheckpointError(
                f"{str(path)!r} ended {len(buffer) - done} bytes early: it was changed while it "
                "was being read; run again when it is complete."
            )
        done += count
