# SPDX-License-Identifier: Apache-2.0
"""Maps between widths and depths, on pairs whose true map is known."""

import itertools

import pytest
import torch

import lorax_kernels as lk


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed):
    return torch.randn(*shape, generator=seeded(seed))


def semi_orthogonal(q, p, seed):
    tall = torch.linalg.qr(normal(max(q, p), min(q, p), seed=seed)).Q
    return tall if q >= p else tall.T


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize(("p", "q"), [(12, 20), (20, 20), (20, 12)], ids=["wider", "same", "less"])
def test_procrustes_finds_the_map_between_two_embeddings(p, q):
    P = semi_orthogonal(q, p, seed=0)
    X = normal(300, p, seed=1)
    got = lk.procrustes(X, X @ P.T)
    assert got.shape == (q, p)
    if q >= p:
        assert relative(got, P) < 1e-5
    orthonormal = got.T @ got if q >= p else got @ got.T
    assert relative(orthonormal, torch.eye(min(p, q))) < 1e-6


def test_procrustes_is_the_best_of_many():
    X, Y = normal(40, 5, seed=2), normal(40, 8, seed=3)
    best = float((X @ lk.procrustes(X, Y).T - Y).norm())
    others = [float((X @ semi_orthogonal(8, 5, seed=s).T - Y).norm()) for s in range(50)]
    assert best < min(others)


def test_procrustes_by_pieces_is_the_same(monkeypatch):
    X, Y = normal(100, 5, seed=2), normal(100, 8, seed=3)
    want = lk.procrustes(X, Y)
    monkeypatch.setattr("lorax_kernels.alignment._CHUNK_BYTES", 8 * 8 * 7)
    assert relative(lk.procrustes(X, Y), want) < 1e-6


def test_directions_that_no_row_tells_about_go_to_zero():
    X, Y = normal(4, 9, seed=0), normal(4, 12, seed=1)
    P = lk.procrustes(X, Y)
    assert int(torch.linalg.matrix_rank(P)) == 4
    # Rows that no thing lies along.
    assert float((P @ torch.linalg.svd(X).Vh[4:].T).abs().max()) < 1e-5


@pytest.mark.parametrize(("d_s", "d_t"), [(4, 6), (6, 4)], ids=["wider", "narrower"])
def test_inner_map_is_the_polar_factor_of_what_the_weights_share(d_s, d_t):
    """Few rows and spaces wider than their number: the quick way, against the definition."""
    h_s, h_t = 20, 31
    P = semi_orthogonal(d_t, d_s, seed=0)
    old, new = normal(h_s, d_s, seed=1), normal(h_t, d_t, seed=2)
    cross = new.double() @ P.double() @ old.double().T
    U, S, Vh = torch.linalg.svd(cross, full_matrices=False)
    told = int((1e-9 * S[0] < S).sum())
    assert told == 4
    got = lk.inner_map(P, reads=[(old, new)])
    assert relative(got, U[:, :told] @ Vh[:told]) < 1e-5


def mlp(h, d, seed):
    """Gate, up and down of one block."""
    return normal(h, d, seed=seed), normal(h, d, seed=seed + 1), normal(d, h, seed=seed + 2)


def test_an_update_is_carried_to_a_wider_copy_of_its_block():
    """The target is the source in other coordinates: the update has to come out in them."""
    (d_s, h_s), (d_t, h_t), r = (12, 30), (16, 44), 3
    P, R = semi_orthogonal(d_t, d_s, seed=0), semi_orthogonal(h_t, h_s, seed=1)
    gate, up, down = mlp(h_s, d_s, seed=2)
    wide = R @ gate @ P.T, R @ up @ P.T, P @ down @ R.T
    stream = lk.procrustes(normal(200, d_s, seed=5), normal(200, d_s, seed=5) @ P.T)
    hidden = lk.inner_map(stream, [(gate, wide[0]), (up, wide[1])], [(down, wide[2])])
    B, A = normal(h_s, r, seed=6), normal(r, d_s, seed=7)
    B_t, A_t = lk.align_lora(B, A, hidden, stream)
    assert relative(B_t @ A_t, R @ B @ A @ P.T) < 1e-5
    # What the widened block computes with its update is what the source computed, in its stream.
    x = normal(d_s, 5, seed=8)
    assert relative((wide[1] + B_t @ A_t) @ P @ x, R @ (up + B @ A) @ x) < 1e-5
    # One weight alone, of rank 12, leaves 18 of the 30 hidden directions open.
    alone = lk.inner_map(stream, [(up, wide[1])])
    assert int(torch.linalg.matrix_rank(alone)) == d_s


def test_gains_of_norms_belong_to_the_map():
    """Two layers that act alike on the normalised stream, though their norms' weights differ."""
    P = semi_orthogonal(16, 12, seed=0)
    g_s, g_t = (0.5 + torch.rand(n, generator=seeded(n)) for n in (12, 16))
    B, A, x = normal(9, 2, seed=1), normal(2, 12, seed=2), normal(12, 5, seed=3)
    B_t, A_t = lk.align_lora(B, A, None, P, gains=(g_s, g_t))
    assert relative(B_t @ A_t @ (g_t[:, None] * (P @ x)), B @ A @ (g_s[:, None] * x)) < 1e-5


def test_size_scales_the_update():
    B, A = normal(9, 2, seed=0), normal(2, 7, seed=1)
    B_t, A_t = lk.align_lora(B.bfloat16(), A, size=3.0)
    assert B_t.dtype == torch.bfloat16
    assert torch.equal(A_t, A)
    assert relative(B_t, 3 * B) < 2**-7


def test_gains_near_zero_are_not_divided_by():
    B, A = normal(9, 2, seed=0), normal(2, 7, seed=1)
    g_s, g_t = torch.ones(7), torch.ones(7)
    g_t[3] = 0.0
    _, A_t = lk.align_lora(B, A, gains=(g_s, g_t))
    assert float(A_t.abs().max()) < 25 * float(A.abs().max())


def test_depth_is_matched_as_the_best_of_all_monotone_ways():
    for seed in range(20):
        like = normal(4, 5, seed=seed).tolist()
        got = lk.match_depth(like)
        pairs = [(j, i) for j, i in enumerate(got) if i is not None]
        assert [i for _, i in pairs] == sorted({i for _, i in pairs})
        total = sum(like[j][i] for j, i in pairs)
        best = max(
            sum(like[j][i] for j, i in zip(rows, columns, strict=True))
            for count in range(5)
            for rows in itertools.combinations(range(4), count)
            for columns in itertools.combinations(range(5), count)
        )
        assert total == pytest.approx(best)


def test_depth_of_a_pruned_and_of_a_deeper_model():
    kept = [0, 1, 3, 4, 6]
    like = [[0.9 if i == k else 0.02 for i in range(7)] for k in kept]
    assert lk.match_depth(like) == kept
    deeper = [[row[j] for row in like] for j in range(7)]
    assert lk.match_depth(deeper) == [0, 1, None, 2, 3, None, 4]
    assert lk.match_depth([]) == []
    assert lk.match_depth([[-0.1, -0.2]]) == [None]


def test_arguments_that_do_not_fit_are_refused():
    B, A, W = normal(9, 2, seed=0), normal(2, 7, seed=1), normal(9, 7, seed=2)
    with pytest.raises(ValueError, match="input_map must have 7 columns"):
        lk.align_lora(B, A, None, torch.eye(8))
    with pytest.raises(ValueError, match="output_map must have 9 columns"):
        lk.align_lora(B, A, torch.eye(7))
    with pytest.raises(ValueError, match="factors must be"):
        lk.align_lora(B, A.T)
    with pytest.raises(ValueError, match="equally many rows"):
        lk.procrustes(B, A)
    with pytest.raises(ValueError, match="at least one pair"):
        lk.inner_map(torch.eye(7))
    with pytest.raises(ValueError, match="must meet streams of 7 and 7, got 9 and 9"):
        lk.inner_map(torch.eye(7), writes=[(W, W)])
