# SPDX-License-Identifier: Apache-2.0
"""The options of a LoRA-X adapter, as a PEFT configuration."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from peft import LoraConfig
from torch import nn
from transformers.pytorch_utils import Conv1D

from lorax_transfer.adapters.lorax_form import CORES, FORMAT_VERSION, PEFT_TYPE
from lorax_transfer.errors import AdapterError

# What of a LoraConfig a LoRA-X adapter keeps; the rest describes factors that it does not train.
_KEPT = (
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "r",
    "revision",
    "target_modules",
    "task_type",
)
# The name of an initialisation: a layer of an ordinary LoRA refuses it.
_INIT = PEFT_TYPE.lower()
_OWN = ("core", "energy", "bandwidth", "scale", "convolutions")
# For these tasks PEFT trains and saves a new head beside the adapter.
_WITH_HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


@dataclass
class LoraXConfig(LoraConfig):
    """A LoRA-X adapter `dW = scale * U C V^T`, with `U`, `V` frozen and only `C` trained.

    A `peft.LoraConfig` to PEFT, so that `get_peft_model`, `Trainer` and adapter management take it.
    `add_lorax_adapter` does the same with all bases computed in one call.

    Args:
        r: singular directions to keep in every layer, capped at the shorter side of its weight.
        core: "diagonal" trains `k` numbers a layer, "full" `k^2`, "banded" `(2 bandwidth + 1) k`.
        energy: keep the fewest directions, up to `r`, that hold this share of the squared norm of
            a layer's weight, in (0, 1]; None keeps `r`.
        bandwidth: diagonals beside the main one on either side that a banded core trains.
        scale: what multiplies the update; with Adam a multiplier of the learning rate.
        target_modules: names of modules, a regular expression, or "all-linear".
        convolutions: stride, padding, dilation and padding mode of adapted convolutions, which the
            layers fill in; `fold` looks there.

    Raises:
        AdapterError: an option is out of range or belongs to an ordinary LoRA only.

    Example:
        >>> LoraXConfig(r=64, core="full", target_modules=["q_proj", "v_proj"]).core
        'full'

    The method is LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559).
    """

    r: int = field(default=128, metadata={"help": "Singular directions to keep."})
    lora_alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Use scale instead."}
    )
    target_modules: list[str] | str | None = field(default="all-linear")
    core: str = field(default="full", metadata={"help": "diagonal, full or banded."})
    energy: float | None = field(default=None, metadata={"help": "Share of each weight to keep."})
    bandwidth: int = field(default=0, metadata={"help": "Side diagonals of a banded core."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the update."})
    convolutions: dict[str, dict[str, Any]] = field(
        default_factory=dict, metadata={"help": "Filled in by the layers."}
    )

    def __post_init__(self) -> None:
        """Check the options and have PEFT build layers of LoRA-X."""
        from .layers import LoraXConv2d, LoraXLinear

        self._check()
        self.lora_alpha = self.scale * self.r
        self.init_lora_weights = _INIT  # type: ignore[assignment]
        super().__post_init__()
        layers: dict[type[nn.Module], type[nn.Module]] = {
            nn.Linear: LoraXLinear,
            Conv1D: LoraXLinear,
            nn.Conv2d: LoraXConv2d,
        }
        self._register_custom_module(layers)
        # Set while `add_lorax_adapter` is to compute the bases of all layers at once.
        self.waits_for_bases = False

    def _check(self) -> None:
        if self.core not in CORES:
            raise AdapterError(f"core is {self.core!r}, expected one of {', '.join(CORES)}.")
        if self.r < 1:
            raise AdapterError(f"r is {self.r}, expected at least 1.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy is {self.energy}, expected a share in (0, 1].")
        if (self.core == "banded") != (self.bandwidth > 0):
            raise AdapterError(
                f"bandwidth is {self.bandwidth} with a {self.core} core, expected 1 or more with a "
                "banded core and 0 with any other."
            )
        if self.scale == 0 or not math.isfinite(self.scale):
            raise AdapterError(f"scale is {self.scale}, expected a finite number that is not 0.")
        if self.lora_alpha not in (None, self.scale * self.r):
            raise AdapterError(f"lora_alpha is {self.lora_alpha}, expected None; set scale.")
        if self.task_type in _WITH_HEADS:
            raise AdapterError(
                f"task_type is {self.task_type}, with which PEFT trains a head that belongs to no "
                "core; leave task_type out and train the head by itself."
            )
        found = sorted(self._foreign())
        if found:
            raise AdapterError(
                f"{', '.join(found)} is an option of an ordinary LoRA that a LoRA-X adapter cannot "
                "carry; leave it out."
            )

    def _foreign(self) -> Iterator[str]:
        """Names of the options that were set and mean nothing here."""
        known = {*_KEPT, *_OWN, "peft_type", "lora_alpha", "runtime_config"}
        for option in fields(self):
            if option.name in known:
                continue
            make = option.default_factory
            default = make() if callable(make) else option.default
            value = getattr(self, option.name)
            if value != default and (option.name, value) != ("init_lora_weights", _INIT):
                yield option.name

    def to_dict(self) -> dict[str, Any]:
        """The content of the native form's ``adapter_config.json``."""
        everything = super().to_dict()
        kept = {name: everything[name] for name in (*_KEPT, *_OWN) if name in everything}
        if not self.convolutions:
            del kept["convolutions"]
        # PEFT keeps module names as a set, whose order changes from run to run.
        kept.update({key: sorted(x) for key, x in kept.items() if isinstance(x, (set, list))})
        return {**kept, "peft_type": PEFT_TYPE, "format_version": FORMAT_VERSION}

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> "LoraXConfig":
        """Make a configuration of what `to_dict` gave.

        Raises:
            AdapterError: it is of another kind of adapter, or of a later version of this one.
        """
        kind, version = kwargs.pop("peft_type", None), kwargs.pop("format_version", None)
        if kind != PEFT_TYPE:
            raise AdapterError(f"peft_type is {kind!r}, expected {PEFT_TYPE!r}: no LoRA-X adapter.")
        if version != FORMAT_VERSION:
            raise AdapterError(
                f"format_version is {version!r}, expected {FORMAT_VERSION}; load the adapter with "
                "the version of lorax-transfer that wrote it."
            )
        try:
            return cls(**kwargs)
        except TypeError as error:
            raise AdapterError(f"it is no configuration of a LoRA-X adapter: {error}.") from error
