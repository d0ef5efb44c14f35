# SPDX-License-Identifier: Apache-2.0
"""The matrices of an iteration as its products read them."""

from dataclasses import dataclass, replace

import torch

from . import ops

# A float16 holds 11 bits: the second piece of a float32 is scaled up by as many.
_PIECE = 2.0**11
# Gram matrices are held in float32 a few at a time.
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
        high = W.half()
        low = ((W - high) * _PIECE).half()
        return Stack((high, low), (1.0, 1 / _PIECE))

    @staticmethod
    def gram(tall: torch.Tensor, halves: bool, backend: str) -> "Stack":
        """`W^T W` of `(b, m, n)`, from 16-bit entries under 1/2 in size where `halves`."""
        if not halves:
            return Stack((ops.gram(tall, backend=backend),))
        n = tall.shape[2]
        step = max(1, _SCRATCH_BYTES // (4 * n * n))
        # On tensor cores to their own accuracy: the filter needs no more.
        products = (torch.bmm(W.mT, W, out_dtype=torch.float32) for W in tall.split(step))
        pieces = [Stack.of(G, halves) for G in products]
        parts = zip(*(piece.parts for piece in pieces), strict=True)
        return Stack(tuple(torch.cat(part) for part in parts), pieces[0].factors)

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
        for part, factor in list(zip(self.parts, self.factors, strict=True))[:pieces]:
            term = ops.thin_matmul(part, X, transpose=transpose, pieces=pieces, backend=backend)
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
        return self.backward(self.forward(X, pieces), pieces)

    def __getitem__(self, index: torch.Tensor) -> "Operator":
        """The operators of the matrices that `index` names."""
        return replace(self, W=self.W[index], G=None if self.G is None else self.G[index])
