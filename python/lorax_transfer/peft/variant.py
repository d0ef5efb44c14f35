# SPDX-License-Identifier: Apache-2.0
"""How PEFT's layers apply an adapter that is not their own kind: their hooks for it."""

from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora.layer import LoraLayer, LoraVariant

if TYPE_CHECKING:
    from .layers import LoraXLayer


class LoraXVariant(LoraVariant):
    """Tells PEFT's layers how an adapter of this kind is applied, merged and taken out again."""

    @staticmethod
    def forward(
        module: LoraLayer,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The layer's result with the adapter's update added."""
        return result + cast("LoraXLayer", module).update_of(active_adapter, x)

    @staticmethod
    def merge_safe(
        module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A new weight with the update added."""
        return orig_weight + cast("LoraXLayer", module).get_delta_weight(active_adapter).to(
            orig_weight.dtype
        )

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the update to a weight in place."""
        orig_weight.data += (
            cast("LoraXLayer", module).get_delta_weight(active_adapter).to(orig_weight.dtype)
        )

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """A new weight with the update taken out."""
        return orig_weight - cast("LoraXLayer", module).get_delta_weight(active_adapter).to(
            orig_weight.dtype
        )
