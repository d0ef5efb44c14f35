# SPDX-License-Identifier: Apache-2.0
"""The result of every truncated SVD of this package."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SVD:
    """Leading singular triplets: `U diag(S) V^T`, for one matrix or a stack of equal shapes.

    Attributes:
        U: left singular vectors, `(m, k)` or `(b, m, k)`; float32, orthonormal columns.
        S: singular values, `(k,)` or `(b, k)`; float32, descending.
        V: right singular vectors, `(n, k)` or `(b, n, k)`; float32, orthonormal columns. Not
            transposed, as `torch.svd_lowrank` returns it.
        error: estimate, made after the fact, of the relative projector error
            `||V V^T - P||_F / ||P||_F` against the exact leading subspace `P` (`U` is at least as
            good). A float, or a tensor `(b,)`.
        passes: thin products with the matrix or its transpose that were made (a product with its
            Gram matrix counts as two). An int, or a tensor `(b,)`.
        path: "randomized" or "exact"; for a stack a tuple with an entry for each matrix.

    The sign of each pair of vectors is fixed so that the entry of `U` largest in magnitude is
    positive.
    """

    U: torch.Tensor
    S: torch.Tensor
    V: torch.Tensor
    error: float | torch.Tensor
    passes: int | torch.Tensor
    path: str | tuple[str, ...]

    @property
    def rank(self) -> int:
        """Number of triplets kept."""
        return self.S.shape[-1]

    def truncate(self, rank: int) -> "SVD":
        """The leading `rank` triplets, as views.

        The stated error is carried over: it bounds what the wider subspace misses.

        Raises:
            ValueError: `rank` is not between 1 and the rank at hand.
        """
        if not 1 <= rank <= self.rank:
            raise ValueError(f"rank must be between 1 and {self.rank}, got {rank}")
        cut = (self.U[..., :rank], self.S[..., :rank], self.V[..., :rank])
        return SVD(*cut, self.error, self.passes, self.path)

    def unbind(self) -> list["SVD"]:
        """One result for each matrix of a stack."""
        if self.S.dim() == 1:
            return [self]
        errors = torch.as_tensor(self.error).tolist()
        passes = torch.as_tensor(self.passes).tolist()
        return [
            SVD(self.U[i], self.S[i], self.V[i], errors[i], passes[i], self.path[i])
            for i in range(self.S.shape[0])
        ]
