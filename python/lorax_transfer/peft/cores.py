# SPDX-License-Identifier: Apache-2.0
"""The parts of an adapted layer: frozen bases, and the core that is trained between them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lorax_transfer.adapters.lorax_form import DIGEST_BYTES, PROBES, dense_core


class FrozenFactor(nn.Module):
    """A basis in float32 that no optimizer, cast or checkpoint touches.

    A parameter and not a buffer because DistributedDataParallel sends buffers around in every step.
    It is left out of the state dict: it is derived from the base weight again.

    Args:
        basis: `(k, n)` or `(m, k)`.
        compute_dtype: dtype of `weight`, the copy that the forward pass multiplies with.
    """

    def __init__(self, basis: torch.Tensor, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.basis = nn.Parameter(basis, requires_grad=False)
        self.compute_dtype = compute_dtype
        self._copy: torch.Tensor | None = None

    @property
    def weight(self) -> torch.Tensor:
        """The basis in the dtype that the layer computes in."""
        if self.basis.dtype == self.compute_dtype:
            return self.basis
        if self._copy is None or self._copy.device != self.basis.device:
            self._copy = self.basis.detach().to(self.compute_dtype)
        return self._copy

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
        form: "diagonal", "full" or "banded".
        rank: directions `k`.
        bandwidth: side diagonals of a banded core.
        device: where to create it.

    Attributes:
        weight: `(k,)`, `(k, k)`, or `(2 bandwidth + 1, k)` with row `i` the diagonal
            `i - bandwidth`, its first entries used; float32, zero at first.
        probe: `(2, k)`, see `lorax_form.probe`.
        digest: `(16,)` uint8, see `lorax_form.digest`.
    """

    def __init__(
        self, form: str, rank: int, bandwidth: int, device: torch.device | None = None
    ) -> None:
        super().__init__()
        shapes = {"diagonal": (rank,), "full": (rank, rank), "banded": (2 * bandwidth + 1, rank)}
        self.form = form
        self.rank = rank
        self.weight = nn.Parameter(torch.zeros(shapes[form], device=device))
        self.register_buffer("probe", torch.zeros(PROBES, rank, device=device))
        digest = torch.zeros(DIGEST_BYTES, dtype=torch.uint8, device=device)
        self.register_buffer("digest", digest)

    def dense(self) -> torch.Tensor:
        """The core as a matrix `(k, k)`; differentiable."""
        return dense_core(self.weight, self.form)
