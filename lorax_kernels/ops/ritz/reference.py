# SPDX-License-Identifier: Apache-2.0
"""The SVD of `Q B^T` from Gram matrices, in plain PyTorch."""

import torch

from ..cholesky_qr.reference import split_gram

DONE, DEPENDENT, NOT_FINITE = 0, 1, 2
# Where the diagonal of the Cholesky factor of `Q^T Q` is above this, the columns of `Q` are far
# from dependent.
_NEARLY = 0.5
# Down to here the squares of the wanted singular values are known well enough to divide by.
_STEEP = 1e-9
# Up to this size a float64 eigenproblem takes LAPACK less time than a round of small kernels.
_ON_HOST = 128


def ritz_reference(
    Q: torch.Tensor, B: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`U`, `S`, `V` and a status for each `(m, l)`, `(n, l)` pair of a batch, in float64 inside."""
    device = Q.device
    Q, B = Q.double(), B.double()
    grams = torch.stack([split_gram(Q), split_gram(B)])
    K, H = grams.cpu() if grams.shape[-1] <= _ON_HOST else grams
    is_finite = (K.isfinite() & H.isfinite()).flatten(1).all(1)
    # What cannot be solved is replaced by what can: a batch goes through LAPACK as a whole.
    eye = torch.eye(K.shape[-1], dtype=K.dtype, device=K.device).expand_as(K)
    K, H = (torch.where(is_finite[:, None, None], X, eye) for X in (K, H))
    L, info = torch.linalg.cholesky_ex(K)
    is_apart = (info == 0) & (L.diagonal(dim1=1, dim2=2) > _NEARLY).all(1)
    L = torch.where(is_apart[:, None, None], L, eye)
    C = torch.linalg.solve_triangular(L, eye, upper=False)
    theta, W = torch.linalg.eigh(C @ H @ C.mT)
    theta, W = theta.flip(-1)[:, :k], W.flip(-1)[:, :, :k]
    is_apart &= theta[:, -1] > _STEEP * theta[:, 0]
    status = torch.where(is_finite, torch.where(is_apart, DONE, DEPENDENT), NOT_FINITE).int()
    S = torch.where((status == DONE)[:, None], theta.clamp_min(0).sqrt(), 0)
    turn = torch.where((status == DONE)[:, None, None], C.mT @ W, 0)
    right = turn / S.where(S > 0, 1)[:, None]
    left, right = torch.stack([turn, right]).to(device)
    return (Q @ left).float(), S.float().to(device), (B @ right).float(), status.to(device)
