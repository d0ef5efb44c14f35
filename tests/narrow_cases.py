# SPDX-License-Identifier: Apache-2.0
"""What `cholesky_qr` and `ritz` promise, judged in float64; shared by the CPU and the GPU tier."""

import op_cases as cases
import torch

from lorax_kernels import ops
from lorax_kernels.ops.ritz import DEPENDENT, DONE, NOT_FINITE

# (batch, n, l): one, odd, prime, one past a power of two, and a column more than own kernels take
QR_SHAPES = [
    *((1, 1, 1), (3, 63, 7), (2, 199, 63), (1, 1025, 1), (2, 1025, 32), (1, 65, 64)),
    *((2, 64, 33), (1, 300, 96), (1, 130, 128), (1, 199, 129)),
]
# (batch, m, n, l, k): Q and B of different lengths; k from one to all
RITZ_SHAPES = [
    *((1, 1, 1, 1, 1), (2, 63, 199, 7, 3), (1, 199, 63, 63, 63), (1, 1025, 1, 1, 1)),
    *((2, 1025, 199, 32, 6), (1, 500, 1025, 64, 48), (1, 64, 65, 33, 33), (1, 300, 200, 96, 64)),
]
SCALES = [1e-20, 1.0, 1e18]
SPECTRA = ("flat", "steep", "equal", "random")


def random_block(shape: tuple[int, ...], device: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(device)


def check_cholesky_qr(shape: tuple[int, ...], scale: float, backend: str, device: str) -> None:
    b, _, l = shape
    X = random_block(shape, device)
    # Orthonormal but for a condition of about ten, whatever the shape; columns of any size.
    X = torch.linalg.qr(X).Q @ (torch.eye(l, device=device) + random_block((b, l, l), device) / l)
    X = X * scale * 10.0 ** torch.linspace(-3, 3, l, device=device)
    before = X.clone()
    Q = ops.cholesky_qr(cases.awkward(X), backend=backend)
    assert torch.equal(X, before)
    assert Q.is_contiguous()
    assert cases.orthogonality(Q) < cases.ORTHONORMAL_TOLERANCE
    # Column by column: the first half of Q spans the first half of X.
    half = (l + 1) // 2
    assert cases.unspanned(X[:, :, :half], Q[:, :, :half]) < cases.ORTHONORMAL_TOLERANCE


def check_cholesky_qr_hard(name: str, n: int, l: int, backend: str, device: str) -> None:
    X = cases.hard_blocks(n, l, device=device)[name]
    Q = ops.cholesky_qr(X, backend=backend).double()
    assert Q.isfinite().all()
    # Columns are of unit length or shorter, never longer.
    assert float(Q.norm(dim=1).max()) < 1 + 1e-3
    assert torch.equal((Q == 0).all(1), (X == 0).all(1))
    # What is lost is what float32 does not hold: eps times a condition of 1e7.
    is_kept = X.double().norm(dim=1, keepdim=True) > 0
    Q = Q / Q.norm(dim=1, keepdim=True).clamp_min(1e-300)
    basis = torch.linalg.svd(Q, full_matrices=False)
    rank = int((basis.S > 1e-6).sum())
    outside = cases.unspanned(X * is_kept, basis.U[:, :, :rank])
    assert outside < 1e-5


def pair(
    shape: tuple[int, ...], spectrum: str, scale: float, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Q, nearly orthonormal, and B with known singular values."""
    b, m, n, l, _ = shape
    Q = torch.linalg.qr(random_block((b, m, l), device)).Q
    if m > 1:
        Q = Q @ (torch.eye(l, device=device) + 0.05 * random_block((b, l, l), device) / l**0.5)
    if spectrum == "random":
        return Q, scale * random_block((b, n, l), device)
    values = {
        "flat": torch.linspace(1, 0.5, l),
        # Their squares come within a factor of ten of what is refused.
        "steep": 10.0 ** torch.linspace(0, -4, l),
        "equal": torch.ones(l),
    }[spectrum].to(device)
    side = torch.linalg.qr(random_block((b, max(n, l), l), device)).Q[:, :n]
    turn = torch.linalg.qr(random_block((b, l, l), device)).Q
    return Q, scale * ((side * values) @ turn)


def check_ritz(
    shape: tuple[int, ...], spectrum: str, scale: float, backend: str, device: str
) -> None:
    k = shape[-1]
    Q, B = pair(shape, spectrum, scale, device)
    before = Q.clone(), B.clone()
    U, S, V, status = ops.ritz(cases.awkward(Q), cases.awkward(B), k, backend=backend)
    assert torch.equal(Q, before[0])
    assert torch.equal(B, before[1])
    assert status.tolist() == [DONE] * len(Q)
    # A projected onto the span of Q, from a B that is A^T Q: basis @ rows.
    basis, R = torch.linalg.qr(Q.double())
    rows = torch.linalg.solve_triangular(R.mT, B.double().mT, upper=False)
    exact = torch.linalg.svdvals(rows)[:, :k]
    # Float32 rounding of the results.
    torch.testing.assert_close(S.double(), exact, rtol=1e-6, atol=0)
    assert cases.orthogonality(U) < cases.ORTHONORMAL_TOLERANCE
    assert cases.orthogonality(V) < cases.ORTHONORMAL_TOLERANCE
    core = (U.double().mT @ basis) @ (rows @ V.double()) / exact[:, None]
    eye = torch.eye(k, device=device, dtype=torch.float64)
    # A row is divided by its own singular value, as small as 1e-4 of the largest.
    spread = float((exact[:, :1] / exact[:, -1:]).max())
    assert float((core - eye).abs().max()) < 1e-6 * spread


def check_ritz_status(l: int, backend: str, device: str) -> None:
    shape = (1, 120, 100, l, 3)
    Q, B = pair(shape, "flat", 1.0, device)
    twice = Q.clone()
    twice[:, :, 1] = twice[:, :, 0]
    steep = torch.linalg.qr(B).Q * 10.0 ** (-10 * torch.arange(l, device=device).clamp(max=2))
    bad, infinite = B.clone(), Q.clone()
    bad[0, 7, 2] = torch.nan
    infinite[0, 5, 1] = torch.inf
    Qs = torch.cat([Q, twice, 0 * Q, Q, Q, Q, infinite])
    Bs = torch.cat([B, B, B, 0 * B, steep, bad, B])
    U, S, V, status = ops.ritz(Qs, Bs, 3 if l > 3 else l, backend=backend)
    assert status.tolist() == [DONE, *[DEPENDENT] * 4, *[NOT_FINITE] * 2]
    for found in (U, S, V):
        assert found[0].isfinite().all()
        assert bool((found[1:5] == 0).all())
    # Neighbours in the batch make no difference.
    for found, alone in zip((U, S, V), ops.ritz(Q, B, S.shape[1], backend=backend), strict=False):
        torch.testing.assert_close(found[:1], alone, rtol=1e-5, atol=1e-6)
