# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: loaded if it was built, otherwise the reason why not is kept."""

import importlib
from dataclasses import dataclass
from pathlib import Path

_NOTE = Path(__file__).with_name("_build_note.txt")


@dataclass(frozen=True)
class Extension:
    """What is known about `lorax_kernels._C`.

    Attributes:
        loaded: whether the module could be imported.
        reason: why it could not, or how it was built.
        cuda_version: CUDA runtime it was compiled for, as `13000` for 13.0; None without kernels.
        cuda_archs: architectures compiled in, for instance `"8.0;9.0a"`.
    """

    loaded: bool
    reason: str
    cuda_version: int | None = None
    cuda_archs: str = ""


def load() -> Extension:
    """Imports the extension, which registers its kernels with torch's dispatcher."""
    note = _NOTE.read_text().strip() if _NOTE.exists() else "not built in this installation"
    try:
        module = importlib.import_module("lorax_kernels._C")
    except ModuleNotFoundError:
        return Extension(loaded=False, reason=note)
    except ImportError as error:
        # Built against another torch or CUDA: the loader's own words say which symbol is missing.
        return Extension(loaded=False, reason=f"built, but it does not load here: {error}")
    return Extension(True, note, module.cuda_version, module.cuda_archs)
