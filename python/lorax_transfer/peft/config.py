# SPDX-License-Identifier: Apache-2.0
"""The options of a LoRA-X adapter, as a PEFT configuration."""

from dataclasses import dataclass, field
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
_OWN = ("core", "energy", "bandwidth", "scale", "sigma_power")
# Options of LoraConfig under which `U C V^T` would not be what the layer adds.
_REFUSED = (
    "use_dora",
    "use_rslora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
)


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
        sigma_power: weigh directions by their singular values: the core that is applied is
            `S^a C S^a`, with `S` relative to its root mean square over the kept directions.
        target_modules: names of modules, a regular expression, or "all-linear".

    Raises:
        AdapterError: an option is out of range or belongs to an ordinary LoRA only.

    Example:
        >>> LoraXConfig(r=64, core="full", target_modules=["q_proj", "v_proj"]).core
        'full'

    The method is LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559).
    """

    r: int = field(default=64, metadata={"help": "Singular directions to keep."})
    lora_alpha: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Use scale instead."}
    )
    target_modules: list[str] | str | None = field(default="all-linear")
    core: str = field(default="full", metadata={"help": "diagonal, full or banded."})
    energy: float | None = field(default=None, metadata={"help": "Share of each weight to keep."})
    bandwidth: int = field(default=0, metadata={"help": "Side diagonals of a banded core."})
    scale: float = field(default=1.0, metadata={"help": "Factor of the update."})
    sigma_power: float = field(default=0.0, metadata={"help": "Weighting by singular values."})

    def __post_init__(self) -> None:
        """Check the options and have PEFT build layers of LoRA-X."""
        from .layers import LoraXConv2d, LoraXLinear

        self._check()
        self.lora_alpha = self.scale * self.r
        # An ordinary LoRA layer that is handed this configuration refuses the unknown name.
        self.init_lora_weights = PEFT_TYPE.lower()  # type: ignore[assignment]
        super().__post_init__()
        layers: dict[type[nn.Module], type[nn.Module]] = {
            nn.Linear: LoraXLinear,
            Conv1D: LoraXLinear,
            nn.Conv2d: LoraXConv2d,
        }
        self._register_custom_module(layers)
        # Bases wait for `fill_bases`, which computes those of all layers at once.
        self.waits_for_bases = False

    def _check(self) -> None:
        if self.core not in CORES:
            raise AdapterError(f"core is {self.core!r}, expected one of {', '.join(CORES)}")
        if self.r < 1:
            raise AdapterError(f"r is {self.r}, expected at least 1")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise AdapterError(f"energy is {self.energy}, expected a share in (0, 1]")
        if (self.core == "banded") != (self.bandwidth > 0):
            raise AdapterError(
                f"bandwidth is {self.bandwidth} with a {self.core} core, expected 1 or more with a "
                "banded core and 0 with any other"
            )
        if self.lora_alpha not in (None, self.scale * self.r):
            raise AdapterError(f"lora_alpha is {self.lora_alpha}, expected None; set scale instead")
        found = [name for name in _REFUSED if getattr(self, name)]
        if found or self.bias != "none":
            raise AdapterError(
                f"{', '.join(found) or 'bias'} is an option of an ordinary LoRA that a LoRA-X "
                "adapter cannot carry; leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """The content of the native form's ``adapter_config.json``."""
        everything = super().to_dict()
        kept = {name: everything[name] for name in (*_KEPT, *_OWN) if name in everything}
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
            raise AdapterError(f"peft_type is {kind!r}, expected {PEFT_TYPE!r}: no LoRA-X adapter")
        if version != FORMAT_VERSION:
            raise AdapterError(
                f"format_version is {version!r}, expected {FORMAT_VERSION}; load the adapter with "
                "the version of lorax-transfer that wrote it"
            )
        return cls(**kwargs)
