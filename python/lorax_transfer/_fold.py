# SPDX-License-Identifier: Apache-2.0
"""A LoRA-X adapter as an ordinary LoRA of the same update, which stock PEFT loads."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

import lorax_kernels as lk

from ._native import expand
from .adapters import Adapter, lorax_form, write_adapter
from .adapters.lorax import read_lorax
from .bases import BasisMaker
from .checkpoints import open_checkpoint
from .errors import TransferError
from .plan import BATCH_BYTES
from .preflight import PathLike, check_output, pick_device, probe_backend

CACHE_VARIABLE = "LORAX_TRANSFER_CACHE"
_DTYPES = {
    "auto": torch.float32,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def fold(
    adapter: PathLike,
    base: PathLike,
    output: PathLike,
    *,
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    overwrite: bool = False,
    cache: PathLike | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    command: str | None = None,
) -> Adapter:
    """Multiply the cores of a LoRA-X adapter out with the bases of its base model.

    Args:
        adapter: directory of a LoRA-X adapter in its native form.
        base: base model that it was trained on: a directory of safetensors, a .safetensors or
            .gguf file, or a Hugging Face id.
        output: directory to write.
        dtype: of the factors: "auto" (float32), "fp32", "bf16" or "fp16".
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        backend: "auto", "cuda", "triton" or "reference".
        overwrite: replace an existing adapter in `output`.
        cache: directory of bases to reuse and add to; by default that of the environment variable
            LORAX_TRANSFER_CACHE, and none without it.
        progress: called as `progress(stage, done, total)`.
        command: command line to record in the adapter.

    Returns:
        The LoRA that was written: of every layer `B = scale * U C` and `A = V^T`, with alpha such
        that PEFT adds `B A`.

    Raises:
        TransferError: something is missing, broken, or does not fit together; the subclasses in
            `lorax_transfer.errors` say what.

    Example:
        >>> fold("adapters/summarise", "org/base", "summarise-lora")  # doctest: +SKIP
    """
    if dtype not in _DTYPES:
        raise TransferError(f"dtype is {dtype!r}, expected one of {', '.join(_DTYPES)}.")
    check_output(Path(output), overwrite)
    native = read_lorax(adapter)
    native.check_foldable()
    place = pick_device(device)
    probe_backend(place, backend)
    kept = cache or os.environ.get(CACHE_VARIABLE) or None
    bases = BasisMaker(
        lorax_form.TOLERANCE,
        backend,
        workspace=BATCH_BYTES,
        cache=None if kept is None else Path(kept),
        is_exact=True,
    )
    done = 0

    def step(layers: int) -> None:
        nonlocal done
        done += layers
        if progress is not None:
            progress("bases", done, len(native.layers))

    with open_checkpoint(base) as source:
        step(0)
        folded = expand(native, source, bases, place, step)
        facts = {
            "kind": "fold",
            "version": lk.__version__,
            "adapter": str(native.location),
            "adapter_hash": native.content_hash,
            "source": source.location,
            "command": command,
        }
        write_adapter(
            folded,
            output,
            base_model_name_or_path=source.location,
            provenance={key: value for key, value in facts.items() if value is not None},
            model_card=card(source.location),
            dtype=_DTYPES[dtype],
            overwrite=overwrite,
        )
    return folded


def card(base: str) -> str:
    """The README.md of a folded adapter."""
    return "\n".join(
        [
            "---",
            f"base_model: {base!r}",
            "library_name: peft",
            "tags:",
            "- lora",
            "- lorax-transfer",
            "---",
            "",
            "# A LoRA-X adapter as an ordinary LoRA",
            "",
            f"The cores of a LoRA-X adapter, multiplied out with the singular vectors of {base}.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            'model = PeftModel.from_pretrained(model, "path/to/this/directory")',
            "```",
            "",
        ]
    )
