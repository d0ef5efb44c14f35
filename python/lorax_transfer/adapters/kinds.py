# SPDX-License-Identifier: Apache-2.0
"""The parts of an adapter that can be left out, and what to do where one cannot be carried."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorax_transfer.errors import AdapterError


@dataclass(frozen=True)
class Kind:
    """One kind of content that is refused unless it is dropped.

    Args:
        what: what it is, as a noun phrase.
        advice: what the user can do instead of, or by, dropping it.
        is_carried: it is not refused, but can be dropped all the same.
    """

    what: str
    advice: str
    is_carried: bool = False


DROPPABLE: Mapping[str, Kind] = {
    "dora": Kind(
        "DoRA magnitudes, which rescale the rows of the source's merged weight",
        "train without use_dora, or drop them to carry B @ A alone as a plain update",
    ),
    "modules_to_save": Kind(
        "full copies of weights (modules_to_save or save_embedding_layers)",
        "extract a low-rank update from them, or drop them and keep the target's own weights, "
        "which loses nothing of the copy that PEFT writes beside a LoRA on an embedding table",
    ),
    "embedding": Kind(
        "LoRA on an embedding table",
        "drop it where the other base has another vocabulary or width",
        is_carried=True,
    ),
    "bias": Kind(
        "trained biases",
        'retrain with bias="none" and lora_bias=False, or drop them',
    ),
    "experts": Kind(
        "LoRA on stacked expert parameters (target_parameters)",
        "retrain with the experts as separate linear modules, or drop it",
    ),
    "trainable_tokens": Kind(
        "retrained token embeddings (trainable_token_indices)",
        "retrain without them, or drop them if the new tokens do not matter",
    ),
    "mutated_init": Kind(
        "an initialisation that changed the base weight, so B @ A is no update of the stock base",
        "save it again with save_pretrained(..., path_initial_model_for_weight_conversion=...), "
        "or drop the fact to carry B @ A as it stands",
    ),
}


def check_drop(drop: Collection[str]) -> frozenset[str]:
    """Check the kinds that a caller wants left out.

    Args:
        drop: names of kinds, each a key of `DROPPABLE`.

    Returns:
        The same as a set.

    Raises:
        AdapterError: if a name is not a kind.
    """
    kinds = frozenset((drop,) if isinstance(drop, str) else drop)
    unknown = sorted(kinds - DROPPABLE.keys())
    if unknown:
        raise AdapterError(
            f"cannot drop {', '.join(map(repr, unknown))}: expected any of {', '.join(DROPPABLE)}."
        )
    return kinds


def refuse(path: Path, found: Mapping[str, Sequence[str]]) -> AdapterError:
    """The error for content that cannot be carried: everything at once, so one retry is enough.

    Args:
        path: the adapter.
        found: for each kind, the tensors or settings that show it.

    Returns:
        The error, to be raised.
    """
    parts = []
    for kind, names in found.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        parts.append(
            f"{kind}: {DROPPABLE[kind].what} ({names[0]}{more}) - {DROPPABLE[kind].advice}"
        )
    flags = " ".join(f"--drop {kind}" for kind in found)
    return AdapterError(
        f"{path} holds what cannot be carried to another base: {'; '.join(parts)}. "
        f"Leave it out with {flags} (drop={sorted(found)!r} in Python)."
    )
