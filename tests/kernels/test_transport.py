# SPDX-License-Identifier: Apache-2.0
"""Transport by the smallest rotation, against Davis and Kahan's formula in float64."""

import oracle
import pytest
import torch

import lorax_kernels as lk
from lorax_kernels.testing import matrix

# float32 bases are orthonormal to 1e-6; bfloat16 rounds two factors by 2^-9 each.
CLOSE = {torch.float32: 5e-6, torch.bfloat16: 2 * 2**-8}
# (m, n, k): tall, odd, more than half of a side, and all of one.
SHAPES = {"tall": (63, 47, 12), "half": (40, 24, 21), "full": (31, 17, 17), "one": (9, 5, 1)}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def factors(m, n, r=5):
    return torch.randn(m, r, generator=seeded(1)), torch.randn(r, n, generator=seeded(2))


def pair(m, n, k, drift=0.3):
    W = matrix("power", m, n, k, generator=seeded(0))
    noise = torch.randn(m, n, generator=seeded(3))
    W_t = W + drift * W.norm() * noise / noise.norm()
    return [lk.truncated_svd(x, k, tol=1e-5) for x in (W, W_t)]


def basis(columns):
    return lk.SVD(columns, torch.ones(columns.shape[1]), columns, 0.0, 0, "exact")


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_transport_rotates_both_sides(shape, dtype):
    m, n, k = shape
    source, target = pair(m, n, k)
    B, A = (x.to(dtype) for x in factors(m, n))
    B_t, A_t = lk.transfer_lora(B, A, target, source, "transport")
    assert B_t.dtype == A_t.dtype == dtype
    left = oracle.direct_rotation(source.U, target.U)
    right = oracle.direct_rotation(source.V, target.V)
    assert relative(B_t, left @ B.double()) < CLOSE[dtype]
    assert relative(A_t, A.double() @ right.T) < CLOSE[dtype]


def test_transport_is_copy_where_the_subspaces_agree():
    source, _ = pair(63, 47, 12)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=seeded(4))).Q
    turned = lk.SVD(source.U @ turn, source.S, source.V @ turn, 0.0, 0, "exact")
    B, A = factors(63, 47)
    B_t, A_t = lk.transfer_lora(B, A, turned, source, "transport")
    assert relative(B_t, B) < CLOSE[torch.float32]
    assert relative(A_t, A) < CLOSE[torch.float32]


def test_transport_does_not_depend_on_signs_or_rotations():
    source, target = pair(63, 47, 12)
    B, A = factors(63, 47)
    turned = []
    for i, svd in enumerate((source, target)):
        turn = torch.linalg.qr(torch.randn(12, 12, generator=seeded(5 + i))).Q
        turned.append(lk.SVD(svd.U @ turn, svd.S, svd.V @ turn, 0.0, 0, "exact"))
    for got, want in zip(
        lk.transfer_lora(B, A, turned[1], turned[0], "transport"),
        lk.transfer_lora(B, A, target, source, "transport"),
        strict=True,
    ):
        assert relative(got, want) < CLOSE[torch.float32]


# Angles of the planes: none, tiny (invisible in a float32 cosine), right, and all at once.
ANGLES = {
    "equal": [0.0, 0.0, 0.0],
    "tiny": [1e-5, 1e-4, 3e-4],
    "right": [torch.pi / 2] * 3,
    "nearly right": [torch.pi / 2 - 1e-6, torch.pi / 2 - 1e-3, torch.pi / 2],
    "mixed": [0.0, 0.7, torch.pi / 2],
}


@pytest.mark.parametrize("angles", ANGLES.values(), ids=ANGLES)
def test_every_angle_is_turned_by_itself(angles):
    m, k = 20, 3
    frame = torch.linalg.qr(torch.randn(m, m, generator=seeded(7)).double()).Q
    one, other = frame[:, :k], frame[:, k : 2 * k]
    angle = torch.tensor(angles, dtype=torch.float64)
    moved = one * angle.cos() + other * angle.sin()
    source, target = basis(one.float()), basis(moved.float())
    eye = torch.eye(m)
    R, R_T = lk.transfer_lora(eye, eye, target, source, "transport")
    # Bases rounded to float32 are orthonormal to 1e-7 each, and k of them add up.
    assert oracle.orthonormality(R) < 2e-6
    assert relative(R.T @ target.U, oracle.projector(source.U) @ (R.T @ target.U).double()) < 2e-6
    # What is orthogonal to both subspaces stays, and no direction turns further than the angles.
    rest = frame[:, 2 * k :].float()
    assert relative(R @ rest, rest) < 2e-6
    turned = torch.linalg.norm(R.double() - torch.eye(m), ord=2)
    assert float(turned) == pytest.approx(2 * torch.sin(angle.max() / 2), abs=2e-6)
    assert relative(R_T, R.T) < 2e-6


def test_transport_keeps_the_norm_of_an_update():
    source, target = pair(63, 47, 12, drift=3.0)
    B, A = factors(63, 47)
    B_t, A_t = lk.transfer_lora(B, A, target, source, "transport")
    assert lk.update_norm(B_t, A_t) == pytest.approx(lk.update_norm(B, A), rel=1e-6)
    assert relative(B_t @ A_t, B @ A) > 0.1


def test_a_deficient_weight_still_gives_a_rotation():
    low = matrix("low_rank", 40, 30, 4, generator=seeded(8))
    source, target = (lk.truncated_svd(W, 9) for W in (low, low + 1e-3 * torch.eye(40, 30)))
    B, A = factors(40, 30)
    B_t, A_t = lk.transfer_lora(B, A, target, source, "transport")
    assert lk.update_norm(B_t, A_t) == pytest.approx(lk.update_norm(B, A), rel=1e-5)


def test_lists_mix_shapes_and_ranks():
    first, second = pair(63, 47, 12), pair(40, 24, 21)
    B, A = zip(factors(63, 47), factors(40, 24, r=2), strict=True)
    targets, sources = [first[1], second[1].truncate(19)], [first[0], second[0]]
    many = lk.transfer_lora(list(B), list(A), targets, sources, "transport")
    single = lk.transfer_lora(B[0], A[0], targets[0], sources[0], "transport")
    cut = lk.transfer_lora(B[1], A[1], targets[1], second[0].truncate(19), "transport")
    for i, want in enumerate((single, cut)):
        assert relative(many[0][i], want[0]) < CLOSE[torch.float32]
        assert relative(many[1][i], want[1]) < CLOSE[torch.float32]


def test_transport_needs_the_source_and_one_shape():
    source, target = pair(63, 47, 12)
    B, A = factors(63, 47)
    with pytest.raises(ValueError, match="needed by method 'transport'"):
        lk.transfer_lora(B, A, target, method="transport")
    other = lk.truncated_svd(torch.randn(50, 47, generator=seeded(9)), 12)
    with pytest.raises(ValueError, match="one shape"):
        lk.transfer_lora(B, A, other, source, "transport")
