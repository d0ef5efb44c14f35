# SPDX-License-Identifier: Apache-2.0
"""What can be found out before the work: places to write to, the device, the backend."""

import os
from pathlib import Path

import torch

import lorax_kernels as lk

from .errors import OutputError, TransferError

PathLike = str | os.PathLike[str]


def pick_device(name: str) -> torch.device:
    """The device of a name such as "auto", "cpu" or "cuda:1"; TransferError if there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise TransferError(f"device is {name!r}, expected auto, cpu, cuda or cuda:N.")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise TransferError(
            f"device is {name!r}, but PyTorch sees {torch.cuda.device_count()} CUDA devices here; "
            "use --device cpu."
        )
    return torch.device(name)


def probe_backend(device: torch.device, backend: str) -> None:
    """Find out now, and not after the files were read, that a backend cannot run here."""
    try:
        lk.truncated_svd(torch.diag(torch.tensor([2.0, 1.0], device=device)), 1, backend=backend)
    except (RuntimeError, ValueError) as error:
        raise TransferError(
            f"{error}; `lorax-transfer info` shows what can run here, and --backend auto takes it."
        ) from error


def check_output(output: Path, overwrite: bool) -> None:
    """Find out now, and not after the work, that the output cannot be written."""
    if os.path.lexists(output) and not overwrite:
        raise OutputError(
            f"{output} already exists; choose another output or ask to overwrite it (--overwrite)."
        )
    parent = output.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"cannot write {output}: {parent} is no directory that you may write to; choose a "
            "place that can be written (--output)."
        )


def check_file(path: PathLike | None, suffix: str, what: str) -> None:
    """Raise OutputError unless a file to write is named as what it will be."""
    # An existing file is replaced, so it has to be one that can be such a file.
    if path is not None and Path(path).suffix.lower() != suffix:
        raise OutputError(f"the {what} is to go to {path}, expected a name that ends in {suffix}.")
