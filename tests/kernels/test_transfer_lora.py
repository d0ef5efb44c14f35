# SPDX-License-Identifier: Apache-2.0
"""Transfer methods against the equations in float64."""

import oracle
import pytest
import torch

import lorax_kernels as lk
from lorax_kernels.testing import matrix

M, N, R, K = 63, 47, 5, 12
# float32 bases are orthonormal to 1e-6 and the equations multiply four of them.
CLOSE = {torch.float32: 5e-6, torch.bfloat16: 2 * 2**-8}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def layer():
    g = seeded(0)
    W_s = matrix("power", M, N, K, generator=g)
    W_t = W_s + 0.05 * torch.randn(M, N, generator=g) / M**0.5
    B, A = torch.randn(M, R, generator=g), torch.randn(R, N, generator=g)
    source, target = (lk.truncated_svd(W, K, tol=1e-5) for W in (W_s, W_t))
    return B, A, source, target


def exact(svd):
    return svd.U.double(), svd.S.double(), svd.V.double()


def relative(got, want):
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_lorax_is_the_two_sided_projection(layer, dtype):
    B, A, _, target = layer
    B_t, A_t = lk.transfer_lora(B.to(dtype), A.to(dtype), target)
    assert B_t.dtype == A_t.dtype == dtype
    want = oracle.lorax(B.to(dtype).double() @ A.to(dtype).double(), exact(target))
    assert relative(B_t.double() @ A_t.double(), want) < CLOSE[dtype]


def test_prolora_is_the_best_rank_r_of_both_blocks(layer):
    B, A, source, target = layer
    B_t, A_t = lk.transfer_lora(B, A, target, source, "prolora")
    want = oracle.best_rank(
        oracle.prolora(B.double() @ A.double(), exact(source), exact(target)), R
    )
    assert B_t.shape == (M, R)
    assert relative(B_t.double() @ A_t.double(), want) < CLOSE[torch.float32]


def test_prolora_keeps_the_shape_of_a_rank_beyond_the_matrix(layer):
    _, _, source, target = layer
    B, A = torch.randn(M, 60, generator=seeded(4)), torch.randn(60, N, generator=seeded(5))
    B_t, A_t = lk.transfer_lora(B, A, target, source, "prolora")
    want = oracle.prolora(B.double() @ A.double(), exact(source), exact(target))
    assert B_t.shape == (M, 60)
    assert relative(B_t.double() @ A_t.double(), want) < CLOSE[torch.float32]


def test_copy_returns_equal_factors_in_new_memory(layer):
    B, A, _, target = layer
    B_t, A_t = lk.transfer_lora(B, A, target, method="copy")
    assert torch.equal(B_t, B)
    assert torch.equal(A_t, A)
    assert B_t.data_ptr() != B.data_ptr()


def test_lorax_does_not_depend_on_signs_or_rotations(layer):
    B, A, _, target = layer
    rotation = torch.linalg.qr(torch.randn(K, K, generator=seeded(9))).Q
    turned = lk.SVD(target.U @ rotation, target.S, target.V @ rotation, 0.0, 0, "exact")
    B_1, A_1 = lk.transfer_lora(B, A, target)
    B_2, A_2 = lk.transfer_lora(B, A, turned)
    assert relative(B_2 @ A_2, (B_1 @ A_1).double()) < CLOSE[torch.float32]


def test_lists_mix_shapes_and_agree_with_single_calls(layer):
    B, A, _, target = layer
    other = lk.truncated_svd(torch.randn(20, 70, generator=seeded(1)), 7)
    B_2, A_2 = torch.randn(20, 2, generator=seeded(2)), torch.randn(2, 70, generator=seeded(3))
    many = lk.transfer_lora([B, B_2], [A, A_2], [target, other])
    for i, single in enumerate((lk.transfer_lora(B, A, target), lk.transfer_lora(B_2, A_2, other))):
        torch.testing.assert_close(many[0][i], single[0])
        torch.testing.assert_close(many[1][i], single[1])
    assert lk.transfer_lora([], [], []) == ([], [])


def test_other_shapes_follow_the_published_formula_and_warn(layer):
    B, A, source, _ = layer
    wider = lk.truncated_svd(matrix("power", 80, 52, K, generator=seeded(6)), K)
    with pytest.warns(lk.UnvalidatedTransferWarning, match="change shape"):
        B_t, A_t = lk.transfer_lora(B, A, wider, source)
    want = oracle.lorax_other_width(B.double() @ A.double(), exact(source), exact(wider))
    assert relative(B_t.double() @ A_t.double(), want) < CLOSE[torch.float32]


@pytest.mark.parametrize("diagonal", [True, False], ids=["diagonal", "full"])
def test_core_is_carried_by_the_overlap_of_the_bases(layer, diagonal):
    _, _, source, target = layer
    C = torch.randn(K, *([] if diagonal else [K]), generator=seeded(7))
    got = lk.transfer_core(C, source, target)
    assert relative(got, oracle.lorax_core(C, exact(source), exact(target))) < 5e-6
    dense = torch.diag(C) if diagonal else C
    dW = oracle.lorax(exact(source)[0] @ dense.double() @ exact(source)[2].T, exact(target))
    assert relative(exact(target)[0] @ got.double() @ exact(target)[2].T, dW) < 5e-6


def test_core_is_copied_where_shapes_differ(layer):
    _, _, source, _ = layer
    wider = lk.truncated_svd(torch.randn(80, 52, generator=seeded(6)), K + 2)
    C = torch.randn(K, generator=seeded(7))
    with pytest.warns(lk.UnvalidatedTransferWarning):
        got = lk.transfer_core(C, source, wider)
    assert got.shape == (K + 2, K + 2)
    assert torch.equal(got[:K, :K], torch.diag(C))
    assert float(got[K:].abs().max()) == float(got[:, K:].abs().max()) == 0


def test_similarity_counts_overlap_against_chance(layer):
    _, _, source, target = layer
    got = lk.subspace_similarity(source, target)
    assert pytest.approx(oracle.similarity(source.U, target.U), abs=1e-5) == got.U
    assert pytest.approx(oracle.similarity(source.V, target.V), abs=1e-5) == got.V
    assert got.chance_U == pytest.approx(K / M)
    assert got.chance_V == pytest.approx(K / N)
    # Unrelated subspaces score about k/m: the mean over 40 pairs has a spread of about 0.003.
    bases = [torch.linalg.qr(torch.randn(M, K, generator=seeded(i))).Q for i in range(80)]
    svds = [lk.SVD(Q, torch.ones(K), Q[:N], 0.0, 0, "exact") for Q in bases]
    scores = [lk.subspace_similarity(a, b).U for a, b in zip(svds[::2], svds[1::2], strict=True)]
    assert sum(scores) / len(scores) == pytest.approx(K / M, abs=0.02)


def test_norms_of_updates():
    g = seeded(8)
    B, A = torch.randn(30, 3, generator=g), torch.randn(3, 20, generator=g)
    D, C = torch.randn(30, 2, generator=g), torch.randn(2, 20, generator=g)
    assert lk.update_norm(B, A) == pytest.approx(float((B @ A).double().norm()), rel=1e-6)
    inner = float(((B @ A).double() * (D @ C).double()).sum())
    assert lk.update_inner(B, A, D, C) == pytest.approx(inner, rel=1e-5)


def bad_calls():
    B, A = torch.randn(6, 2), torch.randn(2, 5)
    svd = lk.truncated_svd(torch.randn(6, 5), 3)
    wide = lk.truncated_svd(torch.randn(8, 5), 3)
    return {
        "method": (lambda: lk.transfer_lora(B, A, svd, method="cca"), "one of lorax"),
        "no_source": (lambda: lk.transfer_lora(B, A, svd, method="prolora"), "source"),
        "no_source_reshaped": (lambda: lk.transfer_lora(B, A, wide), "shapes differ"),
        "copy_reshaped": (lambda: lk.transfer_lora(B, A, wide, svd, "copy"), "only 'lorax'"),
        "wrong_source": (lambda: lk.transfer_lora(B, A, svd, wide), "layer 0"),
        "factors": (lambda: lk.transfer_lora(B, A.T, svd), "factors must be"),
        "lengths": (lambda: lk.transfer_lora([B], [A], []), "one entry a layer"),
        "mixed": (lambda: lk.transfer_lora(B, [A], svd), "all single or all lists"),
        "core": (lambda: lk.transfer_core(torch.ones(4), svd, svd), "as the source's rank"),
        "similarity": (lambda: lk.subspace_similarity(svd, wide), "one shape"),
        "inner": (lambda: lk.update_inner(B, A, B[:3], A), "one shape"),
    }


@pytest.mark.parametrize("name", bad_calls())
def test_bad_arguments_are_named(name):
    call, message = bad_calls()[name]
    with pytest.raises(ValueError, match=message):
        call()
