# SPDX-License-Identifier: Apache-2.0
"""One layer of an adapter cut to fewer directions, and how far that is from the exact one."""

from dataclasses import dataclass, replace

import torch

import lorax_kernels as lk

from ._recompression import LayerRecord
from .adapters import LoraLayer
from .errors import TransferError

# Of lora_B and of lora_A.
Dtypes = tuple[torch.dtype, torch.dtype]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cut:
    """Where the rank of a layer is cut, and how its factors are written.

    Attributes:
        rank: at most this rank; None for no limit.
        energy: smallest rank that keeps this share of the update's energy; None for all.
        dtype: "auto", "fp32", "bf16" or "fp16".
        device: where to compute.
        backend: backend of the kernels.

    Raises:
        TransferError: an option is out of range.
    """

    rank: int | None
    energy: float | None
    dtype: str
    device: torch.device
    backend: str

    def __post_init__(self) -> None:
        """Check the options."""
        if self.rank is not None and self.rank < 1:
            raise TransferError(f"rank is {self.rank}, expected 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise TransferError(f"energy is {self.energy}, expected a share in (0, 1], e.g. 0.99.")
        if self.dtype not in ("auto", *_DTYPES):
            raise TransferError(
                f"dtype is {self.dtype!r}, expected one of auto, {', '.join(_DTYPES)}."
            )

    @property
    def is_exact(self) -> bool:
        """Whether nothing is cut."""
        return self.rank is None and self.energy is None

    def apply(self, layer: LoraLayer) -> tuple[LoraLayer, LayerRecord]:
        """Cut one layer.

        Args:
            layer: its exact update, in any float dtype.

        Returns:
            The layer with fewer, balanced directions in float32, its scale unchanged, and its
            record with an `error` of None. A layer that needs no cut comes back as it is.
        """
        norm = _norm(layer)
        record = LayerRecord(layer.module, layer.rank, layer.rank, None, None, None, norm)
        if norm == 0:
            rank = 1 if self.energy is not None else min(self.rank or layer.rank, layer.rank)
            # Factors can cancel, and a part of them need not.
            kept = layer.with_factors(0 * layer.matrix_B[:, :rank], layer.matrix_A[:rank])
            return kept, replace(record, rank=rank, reason="the update is zero")
        if self.energy is None and (self.rank is None or self.rank >= layer.rank):
            reason = "" if self.rank is None else f"already of rank {layer.rank}"
            return layer, replace(record, energy_kept=1.0, spectral_error=0.0, reason=reason)
        B, A = layer.matrix_B.to(self.device), layer.matrix_A.to(self.device)
        svd = lk.svd_product(B, A, backend=self.backend)
        S = svd.S.double().cpu()
        rank = self._rank(S)
        energy = min(1.0, float((S[:rank] ** 2).sum() / (S**2).sum()))
        spectral = float(S[rank] / S[0]) if rank < len(S) else 0.0
        root = svd.S[:rank].sqrt()
        cut = layer.with_factors(
            (svd.U[:, :rank] * root).cpu(), (svd.V[:, :rank] * root).mT.contiguous().cpu()
        )
        return cut, replace(record, rank=rank, energy_kept=energy, spectral_error=spectral)

    def _rank(self, S: torch.Tensor) -> int:
        # Float32 factors hold nothing under this, so that a share of 1 has an end.
        floor = torch.finfo(torch.float32).eps * float(S[0])
        limit = max(1, int(S.gt(floor).sum()))
        if self.energy is not None:
            kept = torch.cumsum(S**2, dim=0) / (S**2).sum()
            limit = min(limit, int((kept < self.energy).sum()) + 1)
        return min(limit, self.rank or limit)

    def written(self, layer: LoraLayer, auto: Dtypes) -> LoraLayer:
        """The layer in the dtypes that it is written in; `auto` are those of B and of A."""
        to_B, to_A = (_DTYPES[self.dtype],) * 2 if self.dtype != "auto" else auto
        return layer.with_factors(layer.matrix_B.to(to_B), layer.matrix_A.to(to_A))


def _norm(layer: LoraLayer) -> float:
    return lk.update_norm(layer.matrix_B, layer.matrix_A) * abs(layer.scale)


def error(exact: LoraLayer, written: LoraLayer) -> float | None:
    """Relative Frobenius distance of two updates of one module, from their factors.

    Through a QR factorisation: the difference of two norms would end at the root of rounding.
    """
    norm = _norm(exact)
    if norm == 0:
        return None
    pairs = ((exact.lora_A, written.lora_A), (exact.lora_B, written.lora_B))
    if exact.scale == written.scale and all(
        x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs
    ):
        return 0.0
    B = [exact.matrix_B.double() * exact.scale, -written.matrix_B.double() * written.scale]
    A = [exact.matrix_A.double(), written.matrix_A.double()]
    R_B = torch.linalg.qr(torch.cat(B, dim=1)).R
    R_A = torch.linalg.qr(torch.cat(A).mT).R
    return float(torch.linalg.norm(R_B @ R_A.mT)) / norm
