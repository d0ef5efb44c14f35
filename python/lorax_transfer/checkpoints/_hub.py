# SPDX-License-Identifier: Apache-2.0
"""Hugging Face repositories: the local cache, and downloads of what a checkpoint needs."""

import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ._safetensors import read_index

# The names that Hugging Face's libraries write, in their order of preference.
STEMS = ("model.safetensors", "diffusion_pytorch_model.safetensors")


def cached_snapshot(repo_id: str, revision: str | None) -> Path | None:
    """Finds a repository in the local cache, without touching the network.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; None is the default branch.

    Returns:
        The folder of the snapshot, whatever it holds, or None.

    Raises:
        CheckpointError: the package `huggingface_hub` is missing, or the id is malformed.
    """
    hub = _hub_package()
    try:
        # No pattern matches: the folder is wanted even when parts of it were never downloaded.
        folder = hub.snapshot_download(
            repo_id, revision=revision, local_files_only=True, allow_patterns=[]
        )
    except hub.errors.LocalEntryNotFoundError:
        return None
    except hub.errors.HFValidationError as error:
        raise CheckpointError(f"{repo_id!r} is not a valid Hugging Face id ({error}).") from error
    return Path(folder)


def download_snapshot(repo_id: str, revision: str | None) -> Path:
    """Downloads the weights and the configuration of a repository into the cache.

    Args:
        repo_id: `org/name`.
        revision: branch, tag or commit; None is the default branch.

    Returns:
        The folder of the snapshot.

    Raises:
        CheckpointError: the hub cannot be reached, has no such repository, or the repository holds
            no safetensors and no single GGUF file.
    """
    hub = _hub_package()
    try:
        names = [item.rfilename for item in hub.model_info(repo_id, revision=revision).siblings]
        wanted = _choose(repo_id, names)
        if wanted[0].endswith(".index.json"):
            index = hub.hf_hub_download(repo_id, wanted[0], revision=revision)
            wanted += sorted(set(read_index(Path(index)).values()))
        if "config.json" in names:
            wanted.append("config.json")
        return Path(hub.snapshot_download(repo_id, revision=revision, allow_patterns=wanted))
    except hub.errors.GatedRepoError as error:
        raise CheckpointError(
            f"{repo_id!r} is gated; accept its terms on its page and log in with `hf auth login`."
        ) from error
    except (hub.errors.RepositoryNotFoundError, hub.errors.RevisionNotFoundError) as error:
        where = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repo_id!r}{where} is no path here and no repository on the Hugging Face hub that "
            "you can see; check the spelling, or log in with `hf auth login` if it is private."
        ) from error
    except _network_errors(hub) as error:
        raise CheckpointError(
            f"{repo_id!r} is no path here, is not complete in the local cache, and the Hugging "
            f"Face hub cannot be reached ({type(error).__name__}); connect, or download it "
            "elsewhere and name its folder."
        ) from error


def _choose(repo_id: str, names: list[str]) -> list[str]:
    """Picks the files of one copy of the weights: repositories often hold several."""
    top = [name for name in names if "/" not in name]
    for stem in STEMS:
        for name in (stem, f"{stem}.index.json"):
            if name in top:
                return [name]
    for suffix in (".safetensors", ".gguf"):
        found = [name for name in top if name.endswith(suffix)]
        if len(found) == 1:
            return found
        if found:
            raise CheckpointError(
                f"{repo_id!r} holds several {suffix} files and no index: {', '.join(found)}; "
                f"download one with `hf download {repo_id} FILE` and name its path."
            )
    shown = f"{', '.join(top[:8])}{', ...' if len(top) > 8 else ''}"
    raise CheckpointError(
        f"{repo_id!r} holds no safetensors and no GGUF file at its top level (it holds {shown}); "
        "pickles are not opened, so load the model once where you trust it and save it as "
        "safetensors."
    )


def _network_errors(hub: Any) -> tuple[type[Exception], ...]:
    """Returns what a failed request raises: the client differs between releases of the package."""
    clients = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (hub.errors.HfHubHTTPError, OSError, *(client.HTTPError for client in clients))


def _hub_package() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError(
            "Reading a Hugging Face id needs the package huggingface_hub: "
            'pip install "lorax-kernels[transfer]".'
        ) from error
    return huggingface_hub
