# SPDX-License-Identifier: Apache-2.0
"""The parts of an adapted layer: frozen bases, and the core that is trained between them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorax_transfer.adapters.lorax_form import DIGEST_BYTES, PROBES, core_shape, dense_core

from .config import LoraXConfig


class FrozenFactor(nn.Module):
    """A basis in float32 that no optimizer, cast or checkpoint touches.

    A parameter and not a buffer because DistributedDataParallel sends buffers around in every step.
    It is left out of the state dict: it is derived from the base weight again.

    Args:
        basis: `(k, n)` or `(m, k)`.
        compute_dtype: dtype that the layer computes in.
    """

    def __init__(self, basis: torch.Tensor, compute_dtype: torch.dtype) -> None:
        """Hold a basis."""
        super().__init__()
        self.basis = nn.Parameter(basis, requires_grad=False)
        self.compute_dtype = compute_dtype
        self._copy: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The basis in the dtype that products are computed in.

        Under autocast that is the lower one. A copy is kept, where autocast would make it again in
        every call because the basis needs no gradient.
        """
        device = self.basis.device.type
        is_autocast = device != "meta" and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_autocast else self.compute_dtype
        if self.basis.dtype == dtype:
            return self.basis
        copy = self._copy
        if copy is None or copy.dtype != dtype or copy.device != self.basis.device:
            self._copy = copy = self.basis.detach().to(dtype)
        return copy

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        exact = self.basis.data
        super()._apply(fn, recurse)
        if self.basis.dtype != exact.dtype:
            # model.to(bfloat16) casts what the layer computes in, and never the basis.
            self.compute_dtype = self.basis.dtype
            self.basis.data = exact.to(self.basis.device)
        self._copy = None
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass


class Core(nn.Module):
    """The trained core `C` of one layer and what its bases are recognised by.

    Args:
        config: the adapter's configuration.
        rank: directions `k`.
        device: where to create it.

    Attributes:
        weight: `(k,)` diagonal, `(k, k)` full, or `(2 w + 1, k)` banded (`dense_core` says how the
            diagonals lie in it); float32, zero at first.
        probe: `(2, k)`, see `lorax_form.probe`.
        digest: `(16,)` uint8, see `lorax_form.digest`.
    """

    probe: torch.Tensor
    digest: torch.Tensor
    SAVED = ("weight", "probe", "digest")

    def __init__(self, config: LoraXConfig, rank: int, device: torch.device) -> None:
        """Make a core of zeros."""
        super().__init__()
        self.config = config
        self.form = config.core
        self.rank = rank
        shape = core_shape(config.core, rank, config.bandwidth)
        self.weight = nn.Parameter(torch.zeros(shape, device=device))
        self.register_buffer("probe", torch.zeros(PROBES, rank, device=device))
        digest = torch.zeros(DIGEST_BYTES, dtype=torch.uint8, device=device)
        self.register_buffer("digest", digest)

    def dense(self) -> torch.Tensor:
        """The core as a matrix `(k, k)`; differentiable."""
        return dense_core(self.weight, self.form)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        # model.to(bfloat16) is about the base; a core of three digits would not learn.
        tensors = {**self._parameters, **self._buffers}
        exact = {name: tensor.data for name, tensor in tensors.items() if tensor is not None}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                after.data = before.to(after.device)
        return self
