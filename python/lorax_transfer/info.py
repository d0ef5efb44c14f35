# SPDX-License-Identifier: Apache-2.0
"""What this installation can do: versions, device, backends, and why something is missing."""

import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

import lorax_kernels as lk

# Import packages are loaded only where they are used, so what is missing shows here first.
_OPTIONAL = {
    "safetensors": "adapters and base models",
    "huggingface-hub": "base models by Hugging Face id",
    "gguf": "base models in GGUF",
    "matplotlib": "--plot",
    "triton": "the triton backend",
    "peft": "the demo",
    "transformers": "the demo",
}


def info() -> dict[str, Any]:
    """Describe the installation.

    Returns:
        JSON-ready data: `versions`, `device`, `backends` (name, available, reason, ops) and
        `packages` (name, version or None, needed for).
    """
    return {
        "versions": {
            "lorax-kernels": lk.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
        },
        "platform": platform.platform(),
        "device": _devices(),
        "backends": [
            {"name": b.name, "available": b.available, "reason": b.reason, "ops": b.ops}
            for b in lk.backends()
        ],
        "packages": [
            {"name": name, "version": _version(name), "needed_for": use}
            for name, use in _OPTIONAL.items()
        ],
    }


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [f"cuda:{i} {name}" for i, name in enumerate(gpus)] + [
        f"cpu, {torch.get_num_threads()} threads"
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
