# SPDX-License-Identifier: Apache-2.0
"""What every adapter format is read into: LoRA factors by module name."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lorax_transfer.errors import AdapterError

FACTOR_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The low-rank update of one module: ``scale * lora_B @ lora_A`` added to its weight.

    The factors keep the orientation of ``torch.nn.Linear`` whatever the base weight's own layout
    is (see `Adapter.fan_in_fan_out`).

    Args:
        module: module path inside the model as PEFT names it, without ``base_model.model.``, e.g.
            ``model.layers.0.self_attn.q_proj``.
        lora_A: shape ``(r, in)``, or ``(r, in, *kernel)`` for a convolution; float16, bfloat16,
            float32 or float64.
        lora_B: shape ``(out, r)``, or ``(out, r, 1, ...)`` for a convolution.
        scale: what multiplies ``B @ A``: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.
        is_embedding: whether the module is an embedding table ``(vocabulary, d)``; its factors are
            ``lora_B`` ``(vocabulary, r)`` and ``lora_A`` ``(r, d)``, those that PEFT stores as
            ``lora_embedding_A`` and ``lora_embedding_B``, transposed.

    Raises:
        AdapterError: if the shapes do not chain, a dtype is not a float, or scale is not finite.

    Example:
        >>> layer = LoraLayer("fc", torch.ones(4, 16), torch.zeros(8, 4), scale=2.0)
        >>> layer.rank, layer.in_features, layer.out_features, layer.is_conv
        (4, 16, 8, False)
    """

    module: str
    lora_A: torch.Tensor
    lora_B: torch.Tensor
    scale: float
    is_embedding: bool = False

    def __post_init__(self) -> None:
        """Check dtypes, shapes and scale."""
        names = ("lora_A", "lora_B")
        if self.is_embedding:
            names = ("lora_embedding_B", "lora_embedding_A")
        for name, tensor in zip(names, (self.lora_A, self.lora_B), strict=True):
            if tensor.dtype not in FACTOR_DTYPES:
                raise AdapterError(
                    f"{self.module}.{name} is {tensor.dtype}, expected float16, bfloat16, float32 "
                    "or float64; convert the adapter's factors to one of these first."
                )
            if tensor.ndim < 2 or tensor.numel() == 0:
                raise AdapterError(
                    f"{self.module}.{name} has shape {tuple(tensor.shape)}, expected two or more "
                    "non-empty dimensions; a sharded training run has to gather its parameters "
                    "before it saves the adapter."
                )
        a, b = tuple(self.lora_A.shape), tuple(self.lora_B.shape)
        is_bent = self.is_embedding and len(a) > 2
        if is_bent or len(a) != len(b) or a[0] != b[1] or any(size != 1 for size in b[2:]):
            expected = "(out, r)" if len(a) == 2 else f"(out, r{', 1' * (len(a) - 2)})"
            seen = " transposed" if self.is_embedding else ""
            raise AdapterError(
                f"the factors of {self.module} do not chain: {names[0]}{seen} has shape {a} and "
                f"{names[1]}{seen} {b}, expected {names[1]} {expected} with r = {a[0]}; grouped "
                "convolutions and fused low-rank formats cannot be carried."
            )
        if not math.isfinite(self.scale):
            raise AdapterError(
                f"the scale of {self.module} is {self.scale}, expected a finite number; check "
                "lora_alpha and alpha_pattern in the adapter's configuration."
            )

    @property
    def rank(self) -> int:
        """Rank r of the update."""
        return self.lora_A.shape[0]

    @property
    def in_features(self) -> int:
        """Input features, or input channels of a convolution."""
        return self.lora_A.shape[1]

    @property
    def out_features(self) -> int:
        """Output features, or output channels of a convolution."""
        return self.lora_B.shape[0]

    @property
    def is_conv(self) -> bool:
        """Whether the module is a convolution."""
        return self.lora_A.ndim > 2

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel size of a convolution; empty for a linear module."""
        return tuple(self.lora_A.shape[2:])

    @property
    def matrix_A(self) -> torch.Tensor:
        """``lora_A`` as a matrix, shape ``(r, in * prod(kernel_size))``; a view where possible."""
        return self.lora_A.flatten(1)

    @property
    def matrix_B(self) -> torch.Tensor:
        """``lora_B`` as a matrix, shape ``(out, r)``; a view where possible."""
        return self.lora_B.flatten(1)

    def repeats(self, other: "LoraLayer") -> bool:
        """Whether this is another module's update over again, bit by bit.

        So it is with the two ends of a model whose output layer is tied to its embeddings.
        """
        pairs = ((self.lora_A, other.lora_A), (self.lora_B, other.lora_B))
        return self.scale == other.scale and all(
            x.shape == y.shape and x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs
        )

    def with_factors(
        self,
        lora_B: torch.Tensor,
        lora_A: torch.Tensor,
        scale: float | None = None,
        module: str | None = None,
    ) -> "LoraLayer":
        """The same kind of module with other factors.

        Args:
            lora_B: matrix of shape ``(out, r)``; rank and sides may differ from this layer's.
            lora_A: matrix of shape ``(r, in * prod(kernel_size))``, for a convolution folded back
                to ``(r, in, *kernel_size)``.
            scale: what multiplies ``B @ A``; this layer's scale if None.
            module: module path; this layer's if None.

        Returns:
            A new layer; this one is unchanged.

        Raises:
            AdapterError: if a factor is not a matrix or does not fit the kernel.

        Example:
            >>> layer = LoraLayer("conv", torch.ones(4, 3, 3, 3), torch.ones(8, 4, 1, 1), 1.0)
            >>> layer.with_factors(torch.ones(8, 2), torch.ones(2, 27)).lora_A.shape
            torch.Size([2, 3, 3, 3])
        """
        taps = math.prod(self.kernel_size)
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[1] % taps:
            raise AdapterError(
                f"the new factors of {self.module} have shapes {tuple(lora_B.shape)} and "
                f"{tuple(lora_A.shape)}, expected matrices (out, r) and (r, in * {taps})."
            )
        if self.is_conv:
            lora_A = lora_A.reshape(lora_A.shape[0], lora_A.shape[1] // taps, *self.kernel_size)
            lora_B = lora_B.reshape(*lora_B.shape, *(1 for _ in self.kernel_size))
        return LoraLayer(
            self.module if module is None else module,
            lora_A,
            lora_B,
            self.scale if scale is None else float(scale),
            self.is_embedding,
        )


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter as read from its files.

    Args:
        layers: the update of each module by module path, in the order of the file.
        config: the adapter's configuration as read (``adapter_config.json`` for PEFT).
        metadata: metadata in the header of the tensor file.
        location: where it was read from.
        dropped: names of the tensors left out because the caller dropped their kind.
        content_hash: ``"sha256:<hex>"`` of the tensor file.
        dropped_kinds: the dropped kinds that the adapter really held. ``"mutated_init"`` has no
            tensors of its own and shows only here.
        targets: every module that the file held an adapter for, those dropped included.
        is_lorax: whether it came in the native form of LoRA-X: then the rank of a layer is that of
            the subspaces it lives in.
    """

    layers: dict[str, LoraLayer]
    config: dict[str, Any]
    metadata: dict[str, str]
    location: Path
    dropped: tuple[str, ...]
    content_hash: str
    dropped_kinds: tuple[str, ...] = field(default=())
    targets: tuple[str, ...] = field(default=())
    is_lorax: bool = False

    @property
    def fan_in_fan_out(self) -> bool:
        """Whether targeted base weights are stored ``(in, out)``, as GPT-2's ``Conv1D`` does.

        The factors are in ``nn.Linear`` orientation all the same; only the base weight has to be
        transposed. PEFT sets the flag once for a whole adapter and goes by the module's class, so
        where a model mixes both layouts, compare shapes as well.
        """
        return bool(self.config.get("fan_in_fan_out"))

    @property
    def base_model(self) -> str | None:
        """Name or path of the base model that the adapter says it was trained on."""
        return self.config.get("base_model_name_or_path") or None

    def with_layers(self, layers: Iterable[LoraLayer]) -> "Adapter":
        """The same adapter with other layers, keyed by their module paths.

        Args:
            layers: the new layers, in the order in which they are to be written. Modules may be
                renamed, missing, or of another rank and scale: the writer rewrites the
                configuration to match.

        Returns:
            A new adapter; this one is unchanged.

        Raises:
            AdapterError: if two layers name the same module.
        """
        by_module: dict[str, LoraLayer] = {}
        for layer in layers:
            if layer.module in by_module:
                raise AdapterError(
                    f"two layers were given for {layer.module}, expected one for each module."
                )
            by_module[layer.module] = layer
        return replace(self, layers=by_module)
