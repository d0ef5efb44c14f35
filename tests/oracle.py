# SPDX-License-Identifier: Apache-2.0
"""The equations in float64 with an exact SVD: what every result is judged by.

Nothing here imports the project, and nothing here is clever.
"""

import torch


def exact_svd(W, k):
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def projector(basis):
    basis = basis.double()
    return basis @ basis.T


def projector_error(basis, exact):
    """||P - P_exact||_F / ||P_exact||_F, which is also what a random update sees of it."""
    exact = projector(exact)
    return float((projector(basis) - exact).norm() / exact.norm())


def orthonormality(basis):
    basis = basis.double()
    return float((basis.T @ basis - torch.eye(basis.shape[1])).abs().max())


def lorax(dW, target):
    """U_t U_t^T dW V_t V_t^T."""
    U, _, V = target
    return projector(U) @ dW.double() @ projector(V)


def lorax_core(C, source, target):
    """C_t = (U_t^T U_s) C (V_s^T V_t)."""
    C = torch.diag(C) if C.dim() == 1 else C
    return target[0].T.double() @ source[0].double() @ C.double() @ source[2].T @ target[2].double()


def lorax_other_width(dW, source, target):
    """Coordinates copied index by index: U_t U_s^T dW V_s V_t^T."""
    U_s, _, V_s = source
    U_t, _, V_t = target
    return U_t @ (U_s.T @ dW.double() @ V_s) @ V_t.T


def prolora(dW, source, target):
    """P_t P_s dW P_s' P_t' + Q_t Q_s dW Q_s' Q_t'."""
    left_s, right_s = projector(source[0]), projector(source[2])
    left_t, right_t = projector(target[0]), projector(target[2])
    one_m, one_n = torch.eye(len(left_s)), torch.eye(len(right_s))
    dW = dW.double()
    inside = left_t @ left_s @ dW @ right_s @ right_t
    outside = (one_m - left_t) @ (one_m - left_s) @ dW @ (one_n - right_s) @ (one_n - right_t)
    return inside + outside


def best_rank(dW, r):
    U, S, Vh = torch.linalg.svd(dW.double(), full_matrices=False)
    return U[:, :r] * S[:r] @ Vh[:r]


def similarity(source, target):
    """phi = ||U_s^T U_t||_F^2 / k."""
    return float((source.T.double() @ target.double()).norm() ** 2 / source.shape[1])


def direct_rotation(source, target):
    """(P_t P_s + Q_t Q_s) (I - (P_s - P_t)^2)^(-1/2), Davis and Kahan 1970; no right angles."""
    P_s, P_t = projector(source), projector(target)
    one = torch.eye(len(P_s), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(one - (P_s - P_t) @ (P_s - P_t))
    root = vectors * values.rsqrt() @ vectors.T
    return (P_t @ P_s + (one - P_t) @ (one - P_s)) @ root


def anchor(dW, B, A, drift, sides, strength):
    """dW - w D P_A, dW - w P_B D, dW - w (D - Q_B D Q_A)."""
    D = drift.double()
    right = torch.linalg.pinv(A.double()) @ A.double()
    left = B.double() @ torch.linalg.pinv(B.double())
    undone = {
        "input": D @ right,
        "output": left @ D,
        "both": D - (torch.eye(len(left)) - left) @ D @ (torch.eye(len(right)) - right),
    }
    return dW.double() - strength * undone[sides]
