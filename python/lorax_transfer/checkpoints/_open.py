# SPDX-License-Identifier: Apache-2.0
"""From what the user names to the files that hold the weights."""

import os
import re
from pathlib import Path

from ..errors import CheckpointError
from ._base import Checkpoint
from ._gguf import GgufCheckpoint
from ._gguf_header import MAGIC as GGUF_MAGIC
from ._hub import STEMS, cached_snapshot, download_snapshot
from ._safetensors import SafetensorsCheckpoint, read_index

ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl"})
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
WEIGHT_SUFFIXES = frozenset({".safetensors", ".gguf"}) | PICKLE_SUFFIXES

CONVERT = (
    "pickles can run code, so they are not opened; load the model once with the library that wrote "
    "it, where you trust it, and save it as safetensors "
    "(transformers: `AutoModel.from_pretrained(IN).save_pretrained(OUT)`)"
)


def open_checkpoint(spec: str | os.PathLike[str], *, revision: str | None = None) -> Checkpoint:
    """Opens the weights of a base model; reads headers only.

    Args:
        spec: one of
            a directory with `model.safetensors`, with `model.safetensors.index.json` and its
            shards, with diffusers' `diffusion_pytorch_model.safetensors[.index.json]`, with
            exactly one other .safetensors file, or with exactly one .gguf file;
            a .safetensors or .gguf file;
            a Hugging Face id, `org/name` or `org/name@revision`: looked up in the local cache
            first, then downloaded (safetensors, index and config only; a GGUF file if the
            repository holds nothing else).
        revision: branch, tag or commit of a Hugging Face id.

    Returns:
        The checkpoint; a context manager.

    Raises:
        CheckpointError: there is nothing there that can be read safely; the message says what was
            found and what to do.

    Example:
        >>> with open_checkpoint("org/name@main") as base:  # doctest: +SKIP
        ...     base.read("model.embed_tokens.weight").shape
    """
    path = Path(spec).expanduser()
    # An empty name would mean the current directory, and pathlib raises on names that are too long.
    if os.fspath(spec) and os.path.exists(path):
        if revision is not None:
            raise CheckpointError(
                f"revision {revision!r} was given for {str(path)!r}, which is a path; leave it out "
                "or name a Hugging Face id."
            )
        return _open_path(path)
    text = os.fspath(spec)
    repo_id, at, tag = text.partition("@")
    if not REPO_ID.fullmatch(repo_id) or path.suffix in WEIGHT_SUFFIXES or (at and not tag):
        raise CheckpointError(
            f"No checkpoint at {text!r}: the path does not exist, and it is not a Hugging Face id "
            "of the form org/name or org/name@revision."
        )
    if tag and revision is not None and tag != revision:
        raise CheckpointError(
            f"{text!r} names revision {tag!r} and revision {revision!r} was given too; give one."
        )
    return _open_repo(repo_id, tag or revision)


def _open_repo(repo_id: str, revision: str | None) -> Checkpoint:
    folder = cached_snapshot(repo_id, revision)
    unusable: CheckpointError | None = None
    try:
        if folder is not None:
            return _named(_open_path(folder), repo_id, folder)
    except CheckpointError as error:
        # Such as a snapshot that holds only the tokenizer, or an interrupted download.
        unusable = error
    try:
        folder = download_snapshot(repo_id, revision)
    except CheckpointError as error:
        if unusable is None:
            raise
        raise CheckpointError(f"{error} The cached copy cannot be used: {unusable}") from error
    return _named(_open_path(folder), repo_id, folder)


def _named(checkpoint: Checkpoint, repo_id: str, folder: Path) -> Checkpoint:
    checkpoint.location = repo_id
    checkpoint.revision = folder.name
    return checkpoint


def _open_path(path: Path) -> Checkpoint:
    checkpoint = _open_directory(path) if path.is_dir() else _open_file(path)
    checkpoint.location = os.path.abspath(path)
    return checkpoint


def _open_file(path: Path) -> Checkpoint:
    """Opens a file by what its first bytes say; names are no evidence."""
    head = _safe_head(path)
    if head[:4] == GGUF_MAGIC:
        return GgufCheckpoint(path)
    if path.suffix == ".gguf":
        raise CheckpointError(
            f"{str(path)!r} is not a GGUF file: it begins with {head[:4]!r} instead of "
            f"{GGUF_MAGIC!r}; download it again."
        )
    return SafetensorsCheckpoint([path])


def _safe_head(path: Path) -> bytes:
    """Returns the first bytes of a file that is neither a pickle nor a stand-in."""
    try:
        with path.open("rb") as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    # torch.save writes a zip archive; a bare pickle begins with 0x80 and its protocol. A header
    # length of safetensors may begin so too, but then the JSON header opens at byte 8.
    is_zip = head[:4] == b"PK\x03\x04"
    is_pickle = head[:1] == b"\x80" and head[1:2] <= b"\x05" and head[8:] != b"{"
    if is_zip or is_pickle or path.suffix in PICKLE_SUFFIXES:
        raise CheckpointError(f"{str(path)!r} is a pickle: {CONVERT}.")
    if head.startswith(b"version "):
        raise CheckpointError(
            f"{str(path)!r} is a Git LFS pointer and not the file itself; run `git lfs pull`."
        )
    return head


def _open_directory(path: Path) -> Checkpoint:
    for stem in STEMS:
        if (path / stem).is_file():
            return _open_file(path / stem)
        if (path / f"{stem}.index.json").is_file():
            return _open_index(path / f"{stem}.index.json")
    try:
        files = sorted(entry for entry in path.iterdir() if entry.is_file())
    except OSError as error:
        raise CheckpointError(f"Cannot read {str(path)!r}: {error.strerror}.") from error
    weights = [
        entry
        for entry in files
        if entry.suffix == ".safetensors" and entry.name not in ADAPTER_FILES
    ]
    ggufs = [entry for entry in files if entry.suffix == ".gguf"]
    for found, kind in ((weights, ".safetensors"), (ggufs, ".gguf")):
        if len(found) == 1:
            return _open_file(found[0])
        if found:
            names = ", ".join(entry.name for entry in found)
            raise CheckpointError(
                f"{str(path)!r} holds several {kind} files and no index: {names}; name the one to "
                "use."
            )
    raise CheckpointError(f"No weights in {str(path)!r}: {_what_is_there(path, files)}.")


def _what_is_there(path: Path, files: list[Path]) -> str:
    """Says what a directory without base weights holds, and what to do."""
    names = {entry.name for entry in files}
    pickles = [entry.name for entry in files if entry.suffix in PICKLE_SUFFIXES]
    parts = sorted(
        entry.name
        for entry in path.iterdir()
        if entry.is_dir() and any(entry.glob("*.safetensors"))
    )
    if names & set(ADAPTER_FILES):
        return "it holds an adapter, not a base model; name the model that the adapter belongs to"
    if pickles:
        return f"it holds {', '.join(pickles)} only, and {CONVERT}"
    if parts:
        return f"they are in its parts {', '.join(parts)}; name one, such as '{path / parts[0]}'"
    if not files:
        return (
            "it holds no files; a model.safetensors, an index with its shards or a .gguf is needed"
        )
    return (
        f"it holds {', '.join(sorted(names)[:5])}{', ...' if len(names) > 5 else ''}, but no "
        "model.safetensors, no index with its shards and no .gguf"
    )


def _open_index(path: Path) -> Checkpoint:
    weight_map = read_index(path)
    shards = [path.parent / shard for shard in sorted(set(weight_map.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise CheckpointError(
            f"The index {str(path)!r} names {', '.join(missing)}, which "
            f"{'is' if len(missing) == 1 else 'are'} not beside it; download the missing files."
        )
    for shard in shards:
        _safe_head(shard)
    return SafetensorsCheckpoint(shards, weight_map)
