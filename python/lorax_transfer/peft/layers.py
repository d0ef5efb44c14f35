# SPDX-License-Identifier: Apache-2.0
"""The layers that PEFT puts in place of a model's own: `W x + scale * U C V^T x`."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora.layer import Conv2d, Linear, LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

import lorax_kernels as lk
from lorax_transfer.adapters.adapter import FACTOR_DTYPES
from lorax_transfer.adapters.lorax_form import (
    align,
    check_basis,
    check_convolution,
    digest,
    matching,
    probe,
)
from lorax_transfer.errors import AdapterError, MatchError

from .bases import bases_of
from .config import LoraXConfig
from .parts import Core, FrozenFactor
from .variant import LoraXVariant

_META = torch.device("meta")


class LoraXLayer(nn.Module, LoraLayer):
    """What the layers of every kind of module share.

    `lora_A` holds `V^T` and `lora_B` holds `U`, both frozen; `lora_core` holds what is trained.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, "lora_core")
    _FROZEN = ("lora_A", "lora_B")
    lora_core: nn.ModuleDict
    _path: str | None = None

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
            alpha = cast(int, lora_alpha)
            super().update_layer(adapter_name, r, lora_alpha=alpha, config=config, **kwargs)
            return
        base = self.get_base_layer()
        name = kwargs.get("target_name") or self._path or type(base).__name__
        _check_base(base, name)
        if self.merged:
            raise AdapterError(
                f"{name} has the adapters {self.merged_adapters} merged into its weight, expected "
                "the weight itself; call unmerge_adapter first."
            )
        # PEFT's flag is one for all layers; here it is set where it is true, and kept in the file.
        self.fan_in_fan_out = self._is_transposed
        config.fan_in_fan_out |= self._is_transposed
        if isinstance(base, nn.Conv2d):
            config.convolutions[name] = _how(base)
        self.lora_variant[adapter_name] = LoraXVariant()
        self.use_dora[adapter_name] = self.use_rslora[adapter_name] = False
        self.lora_bias[adapter_name] = False
        dropout = config.lora_dropout
        self.lora_dropout[adapter_name] = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        weight = self.base_matrix()
        rank = min(r, *weight.shape)
        m, n = weight.shape
        U, V = (torch.empty(side, rank, device=_META) for side in (m, n))
        self._place(adapter_name, U, V, config)
        if not (config.waits_for_bases or weight.device == _META or _makes_meta()):
            self.set_bases(adapter_name, bases_of([weight], [rank], config.energy)[0], config, name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def set_bases(
        self,
        adapter_name: str,
        svd: lk.SVD,
        config: LoraXConfig,
        module: str,
        recognised_by: torch.Tensor | None = None,
    ) -> None:
        """Give an adapter its bases; the core starts from zero.

        Args:
            adapter_name: which adapter.
            svd: of the base weight as a matrix `(out, in)`, kernels counted as inputs.
            config: the adapter's configuration.
            module: path of the module, for errors.
            recognised_by: digest of the weight that was decomposed; None if it is the base weight
                as it is.

        Raises:
            AdapterError: the singular vectors are not determined.
        """
        svd = check_basis(svd, module)
        weight = self.base_weight
        self._place(adapter_name, svd.U, svd.V, config)
        core = self.core_of(adapter_name)
        core.probe = probe(svd.U)
        core.digest = (digest(weight) if recognised_by is None else recognised_by).to(weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def has_bases(self, adapter_name: str) -> bool:
        """Whether an adapter's bases are there, and not still to be computed."""
        return self.right_of(adapter_name).basis.device != _META

    def core_of(self, adapter_name: str) -> Core:
        """The part of an adapter that is trained."""
        return cast(Core, self.lora_core[adapter_name])

    def left_of(self, adapter_name: str) -> FrozenFactor:
        """`U`, `(m, k)`."""
        return cast(FrozenFactor, self.lora_B[adapter_name])

    def right_of(self, adapter_name: str) -> FrozenFactor:
        """`V^T`, `(k, n)`."""
        return cast(FrozenFactor, self.lora_A[adapter_name])

    @property
    def base_weight(self) -> torch.Tensor:
        """The base layer's weight in its own layout."""
        return cast(torch.Tensor, self.get_base_layer().weight).detach()

    def _place(
        self, adapter_name: str, U: torch.Tensor, V: torch.Tensor, config: LoraXConfig
    ) -> None:
        rank, weight = U.shape[1], self.base_weight
        self.r[adapter_name] = rank
        self.lora_alpha[adapter_name] = config.scale * rank
        self.scaling[adapter_name] = config.scale
        self.lora_A[adapter_name] = FrozenFactor(V.mT.contiguous(), weight.dtype)
        self.lora_B[adapter_name] = FrozenFactor(U.contiguous(), weight.dtype)
        self.lora_core[adapter_name] = Core(config, rank, U.device)

    def applied_core(self, adapter_name: str) -> torch.Tensor:
        """`scale * C`, `(k,)` for a diagonal core, else `(k, k)`; differentiable."""
        core, scale = self.core_of(adapter_name), self.scaling[adapter_name]
        C = core.weight if core.form == "diagonal" else core.dense()
        # A kernel of its own on a GPU, which costs as much as a thin product.
        return C if scale == 1 else C * scale

    def base_matrix(self) -> torch.Tensor:
        """The base weight as a matrix `(out, in)`, kernels counted as inputs."""
        return self.as_matrix(self.base_weight)

    def as_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight in the base layer's layout as a matrix `(out, in)`."""
        return weight.mT if self._is_transposed else weight.flatten(1)

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.get_base_layer(), Conv1D)

    def update_of(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the layer's result for an input."""
        raise NotImplementedError

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The update in float32, in the layout of the base weight."""
        self._check_bases(adapter_name)
        U, V = self.factors_of(adapter_name)
        delta = U @ V.mT
        return delta.mT if self._is_transposed else delta.view_as(self.base_weight)

    def factors_of(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """`(scale U C, V)`, float32: the update is the first times the second transposed."""
        core = self.applied_core(adapter_name)
        U, V = self.left_of(adapter_name).basis, self.right_of(adapter_name).basis.mT
        return (U * core if core.dim() == 1 else U @ core), V

    def check_foldable(self, module: str) -> None:
        """Raise AdapterError if PEFT's ordinary LoRA computes this kind of layer differently."""

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

    def _check_bases(self, adapter_name: str) -> None:
        if not self.has_bases(adapter_name):
            raise AdapterError(
                f"adapter {adapter_name!r} has no bases yet, expected the base weights to be there "
                "when it is added; load the model first, then add or load the adapter."
            )

    def _load_from_state_dict(
        self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # Whatever loads a core, be it a Trainer that resumes or PEFT, comes by here: its bases are
        # those that it was trained with, or there is an error.
        for name in list(self.lora_core):
            keys = {part: f"{prefix}lora_core.{name}.{part}" for part in Core.SAVED}
            if keys["weight"] not in state_dict:
                continue
            absent = [key for key in keys.values() if key not in state_dict]
            if absent:
                raise AdapterError(
                    f"{absent[0]} is missing, expected it beside the core; copy or save the "
                    "adapter again."
                )
            wanted, rank = state_dict[keys["digest"]], state_dict[keys["probe"]].shape[1]
            core = self.core_of(name)
            known = self.has_bases(name) and core.rank == rank
            if not (known and torch.equal(core.digest.cpu(), wanted.cpu())):
                self._derive_bases(name, rank, wanted, prefix.removesuffix("."))
                core = self.core_of(name)
            stored = state_dict[keys["probe"]]
            found = core.probe.to(stored.device)
            state_dict[keys["weight"]] = align(state_dict[keys["weight"]], core.form, stored, found)
            state_dict[keys["probe"]] = found
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _derive_bases(self, adapter_name: str, rank: int, wanted: torch.Tensor, path: str) -> None:
        weight = self.base_weight
        if weight.device == _META:
            self._check_bases(adapter_name)
        found = matching(weight, wanted)
        if found is None:
            raise MatchError(
                f"the base weight of {path} is not the one that the adapter was trained on; load "
                "the base model that it names, or move it with `lorax-transfer transfer`."
            )
        svd = bases_of([self.as_matrix(found)], [rank])[0]
        self.set_bases(adapter_name, svd, self.core_of(adapter_name).config, path, wanted)

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        if not isinstance(self.lora_variant.get(adapter_name), LoraXVariant):
            super()._move_adapter_to_device_of_base_layer(adapter_name, device)
            return
        # PEFT would cast to the base's dtype as well.
        device = device or self.base_weight.device
        if self.has_bases(adapter_name):
            for name in (*self._FROZEN, "lora_core"):
                getattr(self, name)[adapter_name].to(device)


class LoraXLinear(LoraXLayer, Linear):
    """LoRA-X on `nn.Linear` and on the `Conv1D` of transformers."""

    def update_of(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """Three thin products: onto `V`, through the core, back along `U`."""
        self._check_bases(adapter_name)
        x = self.lora_dropout[adapter_name](x)
        z = F.linear(x, self.right_of(adapter_name).weight)
        core = self.applied_core(adapter_name).to(z.dtype)
        z = z * core if core.dim() == 1 else F.linear(z, core)
        return F.linear(z, self.left_of(adapter_name).weight)


class LoraXConv2d(LoraXLayer, Conv2d):
    """LoRA-X on `nn.Conv2d`, whose weight counts as the matrix `(out, in * kh * kw)`."""

    def __init__(self, base_layer: nn.Module, *args: Any, **kwargs: Any) -> None:
        """Take the place of a convolution."""
        # PEFT keeps it to itself.
        self._path = kwargs.get("target_name")
        # Before PEFT, which warns of groups and goes on.
        _check_base(base_layer, self._path or "a convolution")
        super().__init__(base_layer, *args, **kwargs)

    def update_of(self, adapter_name: str, x: torch.Tensor) -> torch.Tensor:
        """A convolution onto `V` as the base layer's own, then one of `1 x 1` with `U C`."""
        self._check_bases(adapter_name)
        base = cast(nn.Conv2d, self.get_base_layer())
        x = self.lora_dropout[adapter_name](x)
        kernel = self.right_of(adapter_name).weight.view(-1, *base.weight.shape[1:])
        # The base layer's own stride, padding and dilation.
        z = base._conv_forward(x, kernel, None)
        core, U = self.applied_core(adapter_name), self.left_of(adapter_name).weight
        left = U * core.to(U.dtype) if core.dim() == 1 else U @ core.to(U.dtype)
        return F.conv2d(z, left[:, :, None, None])

    def check_foldable(self, module: str) -> None:
        """Raise AdapterError if the convolution is one that PEFT's LoRA does not follow."""
        check_convolution(module, _how(cast(nn.Conv2d, self.get_base_layer())))


def _how(base: nn.Conv2d) -> dict[str, Any]:
    """What a convolution does besides its weight, for a file that does not hold the model."""
    padding = base.padding if isinstance(base.padding, str) else list(base.padding)
    return {
        "stride": list(base.stride),
        "padding": padding,
        "dilation": list(base.dilation),
        "padding_mode": base.padding_mode,
    }


def _check_base(base: nn.Module, name: str) -> None:
    weight = cast(torch.Tensor, base.weight)
    if weight.dtype not in FACTOR_DTYPES:
        raise AdapterError(
            f"{name} is stored as {weight.dtype}, expected float16, bfloat16, float32 or float64; "
            "load the model without quantisation."
        )
    if weight.dim() < 2 or weight.numel() == 0:
        raise AdapterError(
            f"{name} has a weight of shape {tuple(weight.shape)}, expected the whole matrix; add "
            "the adapter before the model is sharded."
        )
    if isinstance(base, nn.Conv2d) and base.groups > 1:
        raise AdapterError(
            f"{name} is a convolution in {base.groups} groups, expected one group: its weight is "
            "no single matrix; leave it out of target_modules."
        )


def _makes_meta() -> bool:
    """Whether parameters that are made now land on the meta device, as under low_cpu_mem_usage."""
    return FrozenFactor(torch.zeros(1, 1), torch.float32).basis.device == _META
