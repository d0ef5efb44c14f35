# SPDX-License-Identifier: Apache-2.0
"""The door to the adapter formats: reading picks the format by content."""

import os
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from safetensors import SafetensorError

from lorax_transfer.adapters.adapter import FACTOR_DTYPES, Adapter
from lorax_transfer.adapters.kinds import check_drop
from lorax_transfer.adapters.lorax import NativeAdapter, is_lorax, write_lorax
from lorax_transfer.adapters.peft import (
    CONFIG_FILE,
    check_directory,
    is_peft,
    read_peft,
    write_peft,
)
from lorax_transfer.atomic import atomic_directory
from lorax_transfer.errors import AdapterError, OutputError


def read_adapter(path: str | os.PathLike[str], *, drop: Collection[str] = ()) -> Adapter:
    """Read a LoRA adapter.

    What a low-rank transfer cannot carry is refused, all of it in one error, unless its kind is in
    drop. Every tensor of the file ends up in a layer, in `Adapter.dropped`, or in an error.

    - ``"dora"``: magnitudes are left out and ``B @ A`` is carried as a plain update.
    - ``"modules_to_save"``: full copies of weights, those that PEFT writes beside an embedding
      LoRA (``embed_tokens.base_layer.weight``) or after a resized vocabulary included.
    - ``"experts"``, ``"trainable_tokens"``, ``"bias"``: left out.
    - ``"embedding"``: LoRA on an embedding table, which is read like any other unless it is in
      drop.
    - ``"mutated_init"``: nothing is left out; ``B @ A`` is carried although the base weight was
      changed when training began (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA, or an unknown name). A
      file saved with ``path_initial_model_for_weight_conversion`` says ``init_lora_weights: true``
      and is a plain update.

    Args:
        path: a PEFT directory with ``adapter_config.json`` and ``adapter_model.safetensors``.
        drop: kinds of content to leave out.

    Returns:
        The adapter; `Adapter.dropped` and `Adapter.dropped_kinds` say what was left out.

    Raises:
        AdapterError: if the adapter is missing, broken, not a LoRA, or holds what is refused.

    Example:
        >>> adapter = read_adapter("adapters/summarise")  # doctest: +SKIP
        >>> adapter.layers["model.layers.0.self_attn.q_proj"].rank  # doctest: +SKIP
        16
    """
    kinds = check_drop(drop)
    directory = Path(path)
    check_directory(directory)
    if not is_peft(directory):
        nested = sorted(p.parent.name for p in directory.glob(f"*/{CONFIG_FILE}"))
        hint = f"pass one of its subdirectories {', '.join(nested)}" if nested else "check the path"
        raise AdapterError(
            f"{directory} holds no adapter, expected {CONFIG_FILE} and adapter_model.safetensors; "
            f"{hint}."
        )
    if is_lorax(directory):
        raise AdapterError(
            f"{directory} is a LoRA-X adapter in its native form, expected LoRA factors; make an "
            "ordinary LoRA of it with `lorax-transfer fold`."
        )
    return read_peft(directory, kinds)


def write_adapter(
    adapter: Adapter,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str,
    provenance: dict[str, str],
    model_card: str,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write an adapter as a directory that stock PEFT loads.

    The directory appears whole or not at all. Writing the same adapter twice gives the same bytes.

    Args:
        adapter: what to write. Ranks, scales and modules may differ from what its configuration
            says: the configuration is rewritten to match.
        directory: where to write it.
        base_model_name_or_path: the base model that the adapter now belongs to.
        provenance: entries for the header of the tensor file, written with the prefix
            ``lorax_transfer.``.
        model_card: text of README.md.
        dtype: float16, bfloat16, float32 or float64; None writes each factor in its own dtype.
        overwrite: replace an existing adapter directory.

    Returns:
        Paths of the files written.

    Raises:
        OutputError: if the directory exists, holds something else than an adapter, cannot be
            written, or a factor does not fit into dtype.
        AdapterError: if the adapter has no layers.

    Example:
        >>> write_adapter(  # doctest: +SKIP
        ...     adapter,
        ...     "out",
        ...     base_model_name_or_path="org/target",
        ...     provenance={"method": "lorax"},
        ...     model_card="# Moved",
        ... )
    """
    target = Path(directory)
    if not adapter.layers:
        raise AdapterError(
            f"the adapter from {adapter.location} has no layers left, expected at least one; "
            "nothing was written."
        )
    if dtype is not None and dtype not in FACTOR_DTYPES:
        raise OutputError(
            f"cannot write factors as {dtype}, expected float16, bfloat16, float32 or float64."
        )

    def write(temporary: Path) -> list[str]:
        return write_peft(
            adapter,
            temporary,
            base_model_name_or_path=base_model_name_or_path,
            provenance=provenance,
            dtype=dtype,
        )

    return _write(target, write, model_card, overwrite)


def write_native(
    native: NativeAdapter,
    directory: str | os.PathLike[str],
    *,
    base_model_name_or_path: str,
    provenance: dict[str, str],
    model_card: str,
    overwrite: bool = False,
) -> list[Path]:
    """Write a LoRA-X adapter in its native form.

    Args:
        native: what to write.
        directory: where to write it.
        base_model_name_or_path: the base model that the adapter belongs to.
        provenance: as for `write_adapter`, like the arguments that follow.
        model_card: text of README.md.
        overwrite: replace an existing adapter directory.

    Returns:
        Paths of the files written.

    Raises:
        OutputError: if the directory exists, holds something else than an adapter, or cannot be
            written.
    """

    def write(temporary: Path) -> list[str]:
        return write_lorax(
            native,
            temporary,
            base_model_name_or_path=base_model_name_or_path,
            provenance=provenance,
        )

    return _write(Path(directory), write, model_card, overwrite)


def _write(
    target: Path, write: Callable[[Path], list[str]], model_card: str, overwrite: bool
) -> list[Path]:
    if overwrite:
        _refuse_to_delete(target)
    try:
        with atomic_directory(target, overwrite=overwrite) as temporary:
            names = write(temporary)
            card = temporary / "README.md"
            card.write_text(model_card, encoding="utf-8", errors="backslashreplace")
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write {target}: {error}; nothing was left behind, choose another place."
        ) from error
    return [target / name for name in (*names, "README.md")]


def _refuse_to_delete(target: Path) -> None:
    """Overwriting replaces a whole directory, so it has to be an adapter and nothing more."""
    if not target.is_dir():
        return
    entries = sorted(target.iterdir())
    nested = [entry.name for entry in entries if entry.is_dir()]
    if nested or (entries and not (target / CONFIG_FILE).is_file()):
        what = f"the subdirectory {nested[0]}" if nested else f"no {CONFIG_FILE}"
        raise OutputError(
            f"{target} has {what}, so it is more than an adapter and is not overwritten; choose "
            "another output or remove it yourself."
        )
