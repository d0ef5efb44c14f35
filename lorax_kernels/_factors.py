# SPDX-License-Identifier: Apache-2.0
"""Lists of adapter factors: the checks and the last step that the methods share."""

from collections.abc import Sequence

import torch

from .product import svd_product


def check_factors(lora_B: Sequence[torch.Tensor], lora_A: Sequence[torch.Tensor]) -> None:
    """Raises ValueError unless the factors of every layer chain, one entry a layer."""
    if len(lora_B) != len(lora_A):
        raise ValueError(
            f"one entry a layer is needed in every list, got lengths {[len(lora_B), len(lora_A)]}"
        )
    for i, (B, A) in enumerate(zip(lora_B, lora_A, strict=True)):
        if B.dim() != 2 or A.dim() != 2 or B.shape[1] != A.shape[0]:
            raise ValueError(
                f"layer {i}: factors must be (m, r) and (r, n), got {tuple(B.shape)} and "
                f"{tuple(A.shape)}"
            )


def recompress(
    lora_B: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    like_B: Sequence[torch.Tensor],
    like_A: Sequence[torch.Tensor],
    ranks: Sequence[int],
    backend: str,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The best approximations of rank `ranks[i]`, in the dtypes of `like`.

    Both factors carry the square root of the singular values. A rank beyond the update's own stays
    in the shape of the result, as zeros.
    """
    new_B, new_A = [], []
    products = svd_product(list(lora_B), list(lora_A), backend=backend)
    for svd, B, A, rank in zip(products, like_B, like_A, ranks, strict=True):
        svd = svd.truncate(min(rank, svd.rank))
        root = svd.S.sqrt()
        left, right = B.new_zeros(len(svd.U), rank), A.new_zeros(rank, len(svd.V))
        left[:, : svd.rank] = (svd.U * root).to(B.dtype)
        right[: svd.rank] = (svd.V * root).mT.to(A.dtype)
        new_B.append(left)
        new_A.append(right)
    return new_B, new_A


class Layers:
    """Adapters and both base weights, checked, as lists.

    Raises:
        ValueError: arguments that do not fit together.
    """

    def __init__(
        self,
        lora_B: torch.Tensor | Sequence[torch.Tensor],
        lora_A: torch.Tensor | Sequence[torch.Tensor],
        source: torch.Tensor | Sequence[torch.Tensor],
        target: torch.Tensor | Sequence[torch.Tensor],
        scale: float | Sequence[float],
        strength: float | Sequence[float],
        rank: int | None,
    ) -> None:
        tensors = (lora_B, lora_A, source, target)
        singles = [isinstance(x, torch.Tensor) for x in tensors]
        if any(singles) and not all(singles):
            raise ValueError("lora_B, lora_A, source and target must be all single or all lists")
        if rank is not None and rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        self.is_single = all(singles)
        lists = [[x] if isinstance(x, torch.Tensor) else list(x) for x in tensors]
        self.B, self.A, self.source, self.target = lists
        count = len(self.B)
        self.scales = [float(scale)] * count if isinstance(scale, int | float) else list(scale)
        shares = [strength] * count if isinstance(strength, int | float) else list(strength)
        self.strengths = [float(share) for share in shares]
        for share in self.strengths:
            if not 0 <= share <= 1:
                raise ValueError(f"strength is a share in [0, 1], got {share:g}")
        lengths = [*map(len, lists), len(self.scales), len(self.strengths)]
        if len(set(lengths)) > 1:
            raise ValueError(f"one entry a layer is needed in every list, got lengths {lengths}")
        if any(s == 0 for s in self.scales):
            raise ValueError("a scale is 0; such an update is zero, so there is nothing to move")
        check_factors(self.B, self.A)
        for i, (B, A, W_s, W_t) in enumerate(
            zip(self.B, self.A, self.source, self.target, strict=True)
        ):
            shapes = [(B.shape[0], A.shape[1]), tuple(W_s.shape), tuple(W_t.shape)]
            if len(set(shapes)) > 1:
                raise ValueError(
                    f"layer {i}: update, source and target must be of one shape, got "
                    f"{', '.join(map(str, shapes))}"
                )

    def rows(
        self,
    ) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]]:
        """Factors, weights and scale of each layer."""
        return list(zip(self.B, self.A, self.source, self.target, self.scales, strict=True))

    def unlisted(
        self, result: tuple[list[torch.Tensor], list[torch.Tensor]]
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Tensors where tensors came in."""
        return (result[0][0], result[1][0]) if self.is_single else result
