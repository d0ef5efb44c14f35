# SPDX-License-Identifier: Apache-2.0
"""What a truncated SVD multiplies: counted while it runs, for the floor of its time."""

from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock, local
from unittest import mock

import torch

from lorax_kernels import _operator, ops


@dataclass
class Products:
    """Products with weights and Gram matrices made so far, those that form a Gram matrix too.

    Attributes:
        flops: two a multiply-add; a block in two pieces counts twice.
        size: bytes of weights read once a product, of blocks read and of results written.
        seconds: each product the slower of its arithmetic and its bytes.
    """

    ceiling: dict
    flops: float = 0.0
    size: float = 0.0
    seconds: float = 0.0

    def add(self, flops, size):
        with lock:
            self.flops += flops
            self.size += size
            self.seconds += max(
                flops / self.ceiling["bf16_flops"], size / self.ceiling["bytes_per_s"]
            )


lock = Lock()  # batches run side by side


def nbytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


@contextmanager
def counted(ceiling):
    """Counts what `lorax_kernels` multiplies inside the block, at measured ceilings."""
    found = Products(ceiling)
    thin_matmul, normal_matmul = ops.thin_matmul, ops.normal_matmul
    gram, inner = _operator.Stack.gram, _operator.Operator.inner
    steers = local()

    def count_thin(W, X, *, transpose=False, pieces=2, backend="auto"):
        C = thin_matmul(W, X, transpose=transpose, pieces=pieces, backend=backend)
        if not getattr(steers, "now", False):
            found.add(2 * W.numel() * X.shape[2] * pieces, nbytes(W, X, C))
        return C

    def count_normal(W, X, transpose=False, *, backend="auto"):
        Z = normal_matmul(W, X, transpose, backend=backend)
        # Two products, and what is between them in float16.
        between = 2 * X.shape[0] * W.shape[2 if transpose else 1] * X.shape[2]
        for block in (X, Z):
            found.add(2 * W.numel() * X.shape[2], nbytes(W, block) + between)
        return Z

    def uncounted_inner(*arguments):
        """Two blocks: no product with weights, and none that a floor needs."""
        steers.now = True
        try:
            return inner(*arguments)
        finally:
            steers.now = False

    def count_gram(tall, backend):
        G = gram(tall, backend)
        # Strips from the diagonal on, as kStrip of csrc/gram.cu has them; the rest is mirrored.
        n = tall.shape[2]
        strip = 1024 if n >= 2048 else n
        made = sum(min(strip, n - start) * (n - start) for start in range(0, n, strip))
        found.add(2 * tall.shape[0] * tall.shape[1] * made, nbytes(tall, *G.parts))
        return G

    with (
        mock.patch.object(ops, "thin_matmul", count_thin),
        mock.patch.object(ops, "normal_matmul", count_normal),
        mock.patch.object(_operator.Stack, "gram", staticmethod(count_gram)),
        mock.patch.object(_operator.Operator, "inner", uncounted_inner),
    ):
        yield found
    torch.cuda.synchronize()
