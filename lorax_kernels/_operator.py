# SPDX-License-Identifier: Apache-2.0
"""The matrices of an iteration as its products read them."""

import functools
import math
from dataclasses import dataclass, replace

import torch

from . import ops
from .ops.gram_halves import PIECE, split

# What a second piece holds is made for some matrices at a time, in float32.
_SCRATCH_BYTES = 256 << 20


@dataclass(frozen=True)
class Stack:
    """A stack of matrices, `sum_i factors[i] * parts[i]`, each part `(b, m, n)`."""

    parts: tuple[torch.Tensor, ...]
    factors: tuple[float, ...] = (1.0,)

    @staticmethod
    def of(W: torch.Tensor, halves: bool) -> "Stack":
        """`W` itself, or with `halves` a float32 `W` as two float16 pieces.

        Tensor cores multiply float16 exactly and sum in float32; two pieces hold 22 of 24 bits, if
        the entries are scaled into float16's range.
        """
        if not halves or W.dtype != torch.float32:
            return Stack((W,))
        high, low = (torch.empty_like(W, dtype=torch.float16) for _ in range(2))
        step = max(1, _SCRATCH_BYTES // (4 * W.shape[1] * W.shape[2]))
        for start in range(0, len(W), step):
            some = slice(start, start + step)
            split(W[some], high[some], low[some])
        return Stack((high, low), (1.0, 1 / PIECE))

    @staticmethod
    def gram(tall: torch.Tensor, backend: str) -> "Stack":
        """`W^T W` of `(b, m, n)`; of float16 entries, under 1/2 in size, as two float16 pieces."""
        if tall.dtype != torch.float16:
            return Stack((ops.gram(tall, backend=backend),))
        # On tensor cores to their own accuracy: the filter needs no more.
        return Stack(tuple(ops.gram_halves(tall, backend=backend)), (1.0, 1 / PIECE))

    @property
    def device(self) -> torch.device:
        """Where the matrices are."""
        return self.parts[0].device

    @property
    def shape(self) -> torch.Size:
        """`(b, m, n)`."""
        return self.parts[0].shape

    def __getitem__(self, index: torch.Tensor) -> "Stack":
        """The matrices that `index` names."""
        return Stack(tuple(part[index] for part in self.parts), self.factors)

    def times(self, X: torch.Tensor, transpose: bool, pieces: int, backend: str) -> torch.Tensor:
        """`W X` or `W^T X` in float32, both to `pieces` parts on tensor cores."""
        product = None
        for i, (part, factor) in enumerate(zip(self.parts[:pieces], self.factors, strict=False)):
            # A second part is as small as a second piece.
            own = pieces - i
            term = ops.thin_matmul(part, X, transpose=transpose, pieces=own, backend=backend)
            product = term if product is None else product.add_(term, alpha=factor)
        return product  # type: ignore[return-value]


@dataclass(frozen=True)
class Operator:
    """`A = W^T W` on the short side of a stack, through `W` or through its Gram matrix."""

    W: Stack  # (b, m, n), or (b, n, m) when flipped
    flipped: bool
    # (b, n, n) the Gram matrix: stands in for W in a filter where that is cheaper. What its own
    # rounding leaves is for W to finish.
    G: Stack | None
    backend: str
    # Degrees left from which forming one pays, those in two pieces counted twice.
    gram_from: float = math.inf

    def with_gram(self) -> "Operator":
        """The same with the Gram matrix, in the precision of the weights' first part."""
        first = self.W.parts[0]
        return replace(self, G=Stack.gram(first.mT if self.flipped else first, self.backend))

    @property
    def rows(self) -> int:
        """The longer side."""
        return max(self.W.shape[1:])

    @property
    def on_gpu(self) -> bool:
        """Whether products are cheap against small eigenproblems."""
        return self.W.device.type == "cuda"

    @property
    def rounding(self) -> float:
        """Relative rounding of a block multiplied in one piece; 0 where products are float32."""
        return 2.0**-12 if self.W.parts[0].dtype == torch.float16 else 0.0

    @functools.cached_property
    def gram_rounding(self) -> list[float]:
        """What rounding its Gram matrix to one piece mixes into a direction of each; 0 without it.

        Rounding turns no two directions in particular into each other: a direction is off by as
        much towards each of the others, and by the root of their number times as much in all.
        """
        if self.G is None or self.rounding == 0:
            return [0.0] * self.W.shape[0]
        norm = torch.linalg.vector_norm(self.G.parts[0], dim=(1, 2), dtype=torch.float32)
        return (self.rounding * norm.double() / math.sqrt(3 * self.G.shape[1])).tolist()

    def forward(self, X: torch.Tensor, pieces: int) -> torch.Tensor:
        """`W X`, from the short side to the long one."""
        return self.W.times(X, self.flipped, pieces, self.backend)

    def backward(self, Y: torch.Tensor, pieces: int) -> torch.Tensor:
        """`W^T Y`, from the long side to the short one."""
        return self.W.times(Y, not self.flipped, pieces, self.backend)

    def apply(self, X: torch.Tensor, pieces: int = 1) -> torch.Tensor:
        """`A X`; with one piece to the accuracy that a filter step needs."""
        if self.G is not None:
            return self.G.times(X, False, pieces, self.backend)
        first = self.W.parts[0]
        if pieces == 1 and first.dtype == torch.float16:
            return ops.normal_matmul(first, X, transpose=self.flipped, backend=self.backend)
        return self.backward(self.forward(X, pieces), pieces)

    def inner(self, Q: torch.Tensor, Z: torch.Tensor, pieces: int = 2) -> torch.Tensor:
        """`Q^T Z` of orthonormal `Q`; in two pieces to 2e-6 of the length of a column."""
        if self.rounding == 0:
            return torch.bmm(Q.mT, Z)
        return ops.thin_matmul(Q.half(), Z, transpose=True, pieces=pieces, backend=self.backend)

    def __getitem__(self, index: torch.Tensor) -> "Operator":
        """The operators of the matrices that `index` names."""
        return replace(self, W=self.W[index], G=None if self.G is None else self.G[index])
