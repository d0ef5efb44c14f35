# SPDX-License-Identifier: Apache-2.0
"""The layers that PEFT puts in place of a model's own: `W x + scale * U C V^T x`."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer, LoraVariant
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorax_kernels as lk
from lorax_transfer.adapters.lorax_form import probe

from .config import LoraXConfig
from .cores import Core, FrozenFactor

_META = torch.device("meta")


class LoraXVariant(LoraVariant):
    """Tells PEFT's layers how an adapter of this kind is applied, merged and taken out again."""

    @staticmethod
    def forward(
        module: "LoraXLayer",
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The layer's result with the adapter's update added."""
        return result + module.update_of(active_adapter, x)

    @staticmethod
    def merge_safe(
        module: "LoraXLayer", active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A new weight with the update added."""
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: "LoraXLayer", active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Add the update to a weight in place."""
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    @staticmethod
    def unmerge(
        module: "LoraXLayer", active_adapter: str, orig_weight: torch.Tensor
    ) -> torch.Tensor:
        """A new weight with the update taken out."""
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


class LoraXLayer(LoraLayer):
    """What the layers of every kind of module share.

    `lora_A` holds `V^T` and `lora_B` holds `U`, both frozen; `lora_core` holds the trained part.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_core")
    _FROZEN = ("lora_A", "lora_B")
    lora_core: nn.ModuleDict

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any
    ) -> None:
        """Add an adapter; PEFT calls this when it makes the layer, and again for each further one.

        The bases are computed here unless the configuration says that they come later, or the base
        weight is not there yet.
        """
        if "lora_core" not in self._modules:
            self.lora_core = nn.ModuleDict()
        if not isinstance(config, LoraXConfig):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
            return
        weight = self.base_matrix()
        if not weight.is_floating_point():
            raise TypeError(
                f"{kwargs.get('target_name') or 'a layer'} is stored as {weight.dtype}; LoRA-X "
                "needs the weight itself, so load the model without quantisation"
            )
        self.lora_variant[adapter_name] = LoraXVariant()
        self.use_dora[adapter_name] = False
        self.use_rslora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        rank = min(r, *weight.shape)
        m, n = weight.shape
        self._place(adapter_name, torch.empty(m, rank, device=_META), torch.empty(n, rank), config)
        if not config.waits_for_bases and weight.device != _META:
            from .filling import bases_of

            self.set_bases(adapter_name, bases_of([weight], [rank], config.energy)[0], config)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_bases(self, adapter_name: str, svd: lk.SVD, config: LoraXConfig) -> None:
        """Give an adapter its bases; the core starts from zero.

        Args:
            adapter_name: which adapter.
            svd: of the base weight as a matrix `(out, in)`, kernels counted as inputs.
            config: the adapter's configuration.
        """
        self._place(adapter_name, svd.U, svd.V, config)
        weights = (svd.S / svd.S.square().mean().sqrt()) ** config.sigma_power
        core = self.lora_core[adapter_name]
        core.register_buffer("weights", weights.to(svd.U.device), persistent=False)
        core.probe = probe(svd.U)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _place(
        self, adapter_name: str, U: torch.Tensor, V: torch.Tensor, config: LoraXConfig
    ) -> None:
        rank, weight = U.shape[1], self.get_base_layer().weight
        self.r[adapter_name] = rank
        self.lora_alpha[adapter_name] = config.scale * rank
        self.scaling[adapter_name] = config.scale
        compute = weight.dtype if weight.is_floating_point() else torch.float32
        device = U.device
        self.lora_A[adapter_name] = FrozenFactor(V.mT.to(device).contiguous(), compute)
        self.lora_B[adapter_name] = FrozenFactor(U.contiguous(), compute)
        if adapter_name not in self.lora_core or self.lora_core[adapter_name].rank != rank or self.lora_core[adapter_name].weight.device != device:
            self.lora_core[adapter_name] = Core(config.core, rank, config.bandwidth, device)

    def applied_core(self, adapter_name: str) -> torch.Tensor:
        """`scale * S^a C S^a`, `(k,)` for a diagonal core, else `(k, k)`; differentiable."""
        core, scale = self.lora_core[adapter_name], self.scaling[adapter_name]
        weights = core.weights
        if core.form == "diagonal":
            return core.weight * (weights * weights * scale)
        return weights[:, None] * core.dense() * (weights * scale)

    def base_matrix(self) -> torch.Tensor:
        """The base weight as a matrix `(out, in)`, kernels counted as inputs; a view if it can."""
        weight = self.get_base_layer().weight.detach()
        return weight.mT if self._is_transposed() else weight.flatten(1)

    def _is_transposed(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def update_of(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the layer's result for an input."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update in float32, in the layout of the base weight."""
        core = self.applied_core(adapter_name)
        U, Vt = self.lora_B[adapter_name].basis, self.lora_A[adapter_name].basis
        left = U * core if core.dim() == 1 else U @ core
        delta = left @ Vt
        return delta.mT if self._is_transposed() else delta.view_as(self.get_base_layer().weight)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters active; what is frozen stays frozen."""
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._freeze()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Switch gradients of adapters; what is frozen stays frozen."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._freeze()

    def _freeze(self) -> None:
        for name in self._FROZEN:
            for factor in getattr(self, name).values():
                if isinstance(factor, FrozenFactor):
                    factor.requires_grad_(False)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if not isinstance(self.lora_variant.get(adapter_name), LoraXVariant):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        # PEFT would cast to the base's dtype as well.
        device = device or self.get_base_layer().weight.device
        for name in (*self._FROZEN, "lora_core"):
            part = getattr(self, name)[adapter_name]
            if all(x.device != _META for x in (*part.parameters(), *part.buffers())):
                part.to(device)


class LoraXLinear(LoraXLayer, Linear):
    """LoRA-X on `nn.Linear` and on the `Conv1D` of transformers."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        Linear.__init__(
            self,
            base_layer,
            adapter_name,
            is_target_conv_1d_layer=isinstance(base_layer, Conv1D),
            **kwargs,
        )

    def update_of(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Three thin products: onto `V`, through the core, back along `U`."""
        x = self.lora_dropout[adapter_name](x)
        z = F.linear(x, self.lora_A[adapter_name].weight)
        core = self.applied_core(adapter_name).to(z.dtype)
        z = z * core if core.dim() == 1 else F.linear(z, core)
        return F.linear(z, self.lora_B[adapter_name].weight)


class LoraXConv2d(LoraXLayer, Conv2d):
    """LoRA-X on `nn.Conv2d`, whose weight counts as the matrix `(out, in * kh * kw)`."""

    def update_of(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """A convolution onto `V` as the base layer's own, then one of `1 x 1` with `U C`."""
        base = self.get_base_layer()
        x = self.lora_dropout[adapter_name](x)
        kernel = self.lora_A[adapter_name].weight.view(-1, *base.weight.shape[1:])
        # The base layer's own stride, padding and dilation.
        z = base._conv_forward(x, kernel, None)
        core = self.applied_core(adapter_name)
        U = self.lora_B[adapter_name].weight
        left = U * core.to(U.dtype) if core.dim() == 1 else U @ core.to(U.dtype)
        return F.conv2d(z, left[:, :, None, None])
