# SPDX-License-Identifier: Apache-2.0
"""Inputs and float64 answers of the ops under the truncated SVD, shared by the test tiers."""

import torch

# Unit roundoff of bfloat16 pieces, the coarser: the k-th piece leaves 2^-8k of an element. Products
# add a few of them; sums in float32 add about 1e-6 at the longest inner sizes here.
PIECE_TOLERANCE = {1: 2.0**-7, 2: 2.0**-14, 3: 4e-6}
FLOAT32_TOLERANCE = 4e-6
# Of both products: the block and what is between them are rounded to float16, by 2^-11 at most.
NORMAL_TOLERANCE = 2 * 2.0**-11 + FLOAT32_TOLERANCE
ORTHONORMAL_TOLERANCE = 2e-6
# One pass, of independent columns: the Gram matrix is right to about 1e-5, times their condition.
QUICK_TOLERANCE = 1e-2
# (batch, m, n, l): one, odd, prime, one past a power of two; one column, and as many as W has
THIN_SHAPES = [
    (1, 1, 1, 1),
    (3, 63, 199, 7),
    (2, 199, 63, 63),
    (2, 1025, 63, 16),
    (1, 64, 1025, 65),
]
# (batch, n, l): the same for blocks
BLOCK_SHAPES = [(1, 1, 1), (3, 63, 7), (2, 199, 63), (1, 1025, 199), (2, 130, 130), (1, 65, 64)]


def label(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def relative(found: torch.Tensor, exact: torch.Tensor) -> float:
    """Frobenius error relative to the exact answer; NaN where anything is not finite."""
    exact = exact.double()
    return float((found.double() - exact).norm() / exact.norm().clamp_min(1e-300))


def orthogonality(Q: torch.Tensor) -> float:
    """Largest element of |Q^T Q - I|."""
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[2], device=Q.device, dtype=Q.dtype)).abs().max())


def unspanned(X: torch.Tensor, Q: torch.Tensor) -> float:
    """Largest share of a column of `X` outside the span of `Q`."""
    X, Q = X.double(), Q.double()
    X = X / X.norm(dim=1, keepdim=True).clamp_min(1e-300)
    return float((X - Q @ (Q.mT @ X)).norm(dim=1).max())


def awkward(X: torch.Tensor) -> torch.Tensor:
    """The same values behind strides and an address that no vector load likes."""
    base = torch.empty(X.numel() * 2 + 1, dtype=X.dtype, device=X.device)
    view = base[1:].as_strided(X.shape, (2 * X.stride(0), 2 * X.stride(1), 2))
    view.copy_(X)
    return view


def half_weights(*shape: int, device: str = "cpu") -> torch.Tensor:
    """Float16 entries of at most 1/2 in size, as weights are scaled for tensor cores."""
    return (torch.rand(*shape, device=device) - 0.5).half()


def hard_blocks(n: int, l: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Blocks `(1, n, l)` that break a naive orthonormalisation, by name."""
    normal = torch.randn(1, n, l, device=device)
    duplicates = normal.clone()
    duplicates[:, :, l // 2 :] = normal[:, :, : l - l // 2]
    zeros = normal.clone()
    zeros[:, :, ::3] = 0
    low_rank = torch.randn(1, n, 2, device=device) @ torch.randn(1, 2, l, device=device)
    graded = normal * 10.0 ** torch.linspace(-18, 18, l, device=device)
    U = torch.linalg.qr(normal).Q
    V = torch.linalg.qr(torch.randn(1, l, l, device=device)).Q
    steep = U * 10.0 ** torch.linspace(0, -7, l, device=device) @ V
    return {
        "normal": normal,
        "duplicate columns": duplicates,
        "zero columns": zeros,
        "all zeros": torch.zeros_like(normal),
        "rank two": low_rank,
        "columns from 1e-18 to 1e18": graded,
        "condition 1e7": steep,
        "tiny": normal * 1e-20,
        "huge": normal * 1e18,
    }


def symmetric_matrices(l: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Symmetric float32 matrices `(1, l, l)` that try an eigensolver, by name."""
    X = torch.randn(1, 2 * l, l, device=device)
    gram = X.mT @ X / (2 * l)
    diagonal = torch.diag_embed(torch.linspace(1, 2, l, device=device))[None]
    noise = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    Q = torch.linalg.qr(torch.randn(1, l, l, device=device)).Q
    clusters = torch.ones(l, device=device)
    clusters[: l // 2] = 2
    steep = 10.0 ** torch.linspace(0, -12, l, device=device)
    v = torch.randn(1, l, 1, device=device)
    found = {
        "Gram matrix": gram,
        "indefinite": X[:, :l] + X[:, :l].mT,
        "nearly diagonal": diagonal + 1e-4 * noise,
        "two clusters": (Q * clusters) @ Q.mT,
        "steep": (Q * steep) @ Q.mT,
        "rank one": v @ v.mT,
        "diagonal": diagonal,
        "zero": torch.zeros_like(gram),
        "tiny": gram * 1e-30,
        "huge": gram * 1e30,
    }
    return {name: (H + H.mT) / 2 for name, H in found.items()}


def weigh_halves(pieces: torch.Tensor) -> torch.Tensor:
    """What the two pieces of `gram_halves` stand for, in float64."""
    return pieces[0].double() + pieces[1].double() / 2**11


# (batch, m, n): one; prime; three block rows of a strip, the last of them part empty
GRAM_SHAPES = [(1, 1, 1), (3, 63, 199), (2, 1025, 65), (2, 70, 2305)]
# 24 bits of a matrix whose entries are within 2^10 of each other, and sums as tensor cores make
# them, which on the diagonal lose 2^-24 a step of 16 rows.
HALVES_TOLERANCE = 2e-5
# What stacking must keep: (exponent, smallest and largest size of the entries)
STACKED = [(0, 2.0**-10, 1.0), (9, 2.0**-20, 2.0**-12), (-120, 2.0**110, 2.0**118)]


def scaled_matrix(m: int, n: int, low: float, high: float, device: str = "cpu") -> torch.Tensor:
    """A bfloat16 matrix of entries between these sizes, of either sign."""
    size = low * (high / low) ** torch.rand(m, n, device=device, dtype=torch.float64)
    return (size * torch.randn(m, n, device=device, dtype=torch.float64).sign()).bfloat16()


STACKED_DTYPES = (torch.bfloat16, torch.float16)


def extremes(
    m: int, n: int, dtype: torch.dtype, device: str = "cpu"
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Matrices in which one entry decides the largest magnitude, and what that is, in float32."""
    least = torch.finfo(dtype).smallest_normal / 4
    inf, nan = float("inf"), float("nan")
    deciding = [1.0, -3.0, 0.0, -least, inf, -inf, nan, -nan]
    matrices = []
    for i, entry in enumerate(deciding):
        size = abs(entry) / 2 if abs(entry) < inf else 1.0
        M = torch.rand(m, n, device=device) * size
        if entry != entry:
            M[m // 2, n // 2] = inf
        M[-1 if i % 2 else 0, 0 if i % 2 else -1] = entry
        matrices.append(M.to(dtype))
    return matrices, torch.tensor(deciding, device=device).abs()


def residuals(
    batch: int, l: int, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gram matrices `(b, l, l)` of small residuals and descending values `(b, l)` well apart."""
    rho = 1e-3 * torch.randn(batch, l + 3, l, dtype=torch.float64)
    theta = 2 - torch.arange(l, dtype=torch.float64) / l + 0.1 / l * torch.rand(batch, l).double()
    C = rho.mT @ rho
    return C.to(device, dtype), theta.to(device, dtype)
