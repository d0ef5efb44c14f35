# SPDX-License-Identifier: Apache-2.0
"""Transfers that undo drift, against their equations in float64."""

import oracle
import pytest
import torch

import lorax_kernels as lk

M, N, R = 63, 47, 5
# A difference of float32 weights is rounded to 6e-8 of the weights, here 20 times the drift, and
# bfloat16 rounds the factors that come out.
CLOSE = {torch.float32: 2e-5, torch.bfloat16: 2 * 2**-8}
SCALE = 0.5


def seeded(seed):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def layer():
    W_s = torch.randn(M, N, generator=seeded(0))
    W_t = W_s + 0.05 * torch.randn(M, N, generator=seeded(1))
    B = 0.1 * torch.randn(M, R, generator=seeded(2))
    return B, torch.randn(R, N, generator=seeded(3)), W_s, W_t


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("strength", [0.4, 1.0])
@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_anchor_undoes_the_drift_that_the_adapter_meets(layer, sides, strength, dtype):
    B, A, W_s, W_t = layer
    B, A = B.to(dtype), A.to(dtype)
    rank = 2 * R if sides == "both" else None
    B_t, A_t = lk.anchor_lora(
        B, A, W_s, W_t, scale=SCALE, strength=strength, sides=sides, rank=rank
    )
    assert B_t.dtype == A_t.dtype == dtype
    assert B_t.shape[1] == (2 * R if sides == "both" else R)
    dW = SCALE * B.double() @ A.double()
    want = oracle.anchor(dW, B, A, W_t.double() - W_s.double(), sides, strength)
    assert relative(SCALE * B_t.double() @ A_t.double(), want) < CLOSE[dtype]


def test_the_adapted_target_is_the_adapted_source_on_the_adapters_inputs(layer):
    B, A, W_s, W_t = layer
    x = A.T @ torch.randn(R, 4, generator=seeded(4))
    want = (W_s + SCALE * B @ A) @ x
    B_t, A_t = lk.anchor_lora(B, A, W_s, W_t, scale=SCALE)
    assert relative((W_t + SCALE * B_t @ A_t) @ x, want) < CLOSE[torch.float32]
    assert relative((W_t + SCALE * B @ A) @ x, want) > 0.01
    B_t, A_t = lk.anchor_lora(B, A, W_s, W_t, scale=SCALE, sides="output")
    y = B.T @ (W_t + SCALE * B_t @ A_t)
    assert relative(y, B.T @ (W_s + SCALE * B @ A)) < CLOSE[torch.float32]


def test_both_sides_at_the_adapters_rank_is_the_best_of_that_rank(layer):
    B, A, W_s, W_t = layer
    B_t, A_t = lk.anchor_lora(B, A, W_s, W_t, sides="both")
    want = oracle.anchor(B @ A, B, A, W_t - W_s, "both", 1.0)
    assert B_t.shape == (M, R)
    assert relative(B_t @ A_t, oracle.best_rank(want, R)) < CLOSE[torch.float32]


@pytest.mark.parametrize("sides", ["input", "output", "both"])
def test_dependent_and_unused_directions_do_no_harm(layer, sides):
    B, A, W_s, W_t = layer
    A, B = A.clone(), B.clone()
    A[1], A[2], B[:, 3], B[:, 4] = 0, A[0], 0, 2 * B[:, 0]
    B_t, A_t = lk.anchor_lora(B, A, W_s, W_t, sides=sides, rank=None if sides != "both" else 10)
    want = oracle.anchor(B @ A, B, A, W_t.double() - W_s.double(), sides, 1.0)
    assert relative(B_t @ A_t, want) < CLOSE[torch.float32]


@pytest.mark.parametrize("how", ["equal weights", "no strength"])
def test_anchor_is_copy_where_there_is_nothing_to_undo(layer, how):
    B, A, W_s, W_t = layer
    other, strength = (W_s, 1.0) if how == "equal weights" else (W_t, 0.0)
    for sides in ("input", "output"):
        B_t, A_t = lk.anchor_lora(B, A, W_s, other, strength=strength, sides=sides)
        assert torch.equal(B_t, B)
        assert torch.equal(A_t, A)
    B_t, A_t = lk.anchor_lora(B, A, W_s, other, strength=strength, sides="both")
    assert relative(B_t @ A_t, B @ A) < 1e-6


def test_a_zero_update_is_left_alone_on_the_side_that_is_zero(layer):
    B, A, W_s, W_t = layer
    B_t, A_t = lk.anchor_lora(torch.zeros_like(B), A, W_s, W_t, sides="output")
    assert float((B_t @ A_t).abs().max()) == 0


@pytest.mark.parametrize("scale", [SCALE, -SCALE], ids=["positive", "negative"])
@pytest.mark.parametrize("rank", [None, R], ids=["exact", "recompressed"])
def test_restore_takes_the_largest_drift_back(layer, rank, scale):
    B, A, W_s, W_t = layer
    q = 3
    B_t, A_t = lk.restore_lora(B, A, W_s, W_t, scale=scale, strength=0.7, directions=q, rank=rank)
    U, S, V = oracle.exact_svd(W_t.double() - W_s.double(), q)
    want = scale * B.double() @ A.double() - 0.7 * (U * S) @ V.T
    assert B_t.shape[1] == (R if rank else R + q)
    if rank:
        want = oracle.best_rank(want, rank)
    # Matrices as small as these are decomposed exactly.
    assert relative(scale * B_t @ A_t, want) < 1e-5


def test_restore_takes_a_strength_a_layer(layer):
    B, A, W_s, W_t = layer
    lists = [[x, x] for x in layer]
    several = lk.restore_lora(*lists, strength=[0.25, 1.0], directions=3)
    for i, strength in enumerate((0.25, 1.0)):
        alone = lk.restore_lora(B, A, W_s, W_t, strength=strength, directions=3)
        assert relative(several[0][i] @ several[1][i], alone[0] @ alone[1]) < 1e-6
    with pytest.raises(ValueError, match="lengths"):
        lk.restore_lora(*lists, strength=[0.5])
    with pytest.raises(ValueError, match=r"share in \[0, 1\], got -1"):
        lk.restore_lora(*lists, strength=[0.5, -1.0])


def test_restore_finds_nearly_all_that_its_directions_can_hold():
    """Drift like noise has no gap at any cut; what counts is the energy."""
    drift = 0.01 * torch.randn(400, 600, generator=seeded(9))
    W, zero = torch.zeros(400, 600), torch.zeros(400, 1)
    B, A = lk.restore_lora(zero, zero.new_zeros(1, 600), W, drift, directions=4)
    best = float(torch.linalg.svdvals(drift.double())[:4].square().sum())
    assert lk.update_norm(B, A) ** 2 > 0.99 * best


def test_restore_taken_to_the_end_is_the_source_with_its_adapter(layer):
    B, A, W_s, W_t = layer
    B_t, A_t = lk.restore_lora(B, A, W_s, W_t, directions=1000)
    assert relative(W_t + B_t @ A_t, W_s + B @ A) < 1e-5


def test_restore_of_equal_weights_adds_nothing(layer):
    B, A, W_s, _ = layer
    B_t, A_t = lk.restore_lora(B, A, W_s, W_s, directions=2)
    assert relative(B_t @ A_t, B @ A) < 1e-6


def test_lists_mix_shapes_scales_and_dtypes(layer):
    B, A, W_s, W_t = layer
    B_2, A_2 = torch.randn(20, 2, generator=seeded(5)), torch.randn(2, 70, generator=seeded(6))
    W_2 = torch.randn(20, 70, generator=seeded(7)).bfloat16()
    W_3 = W_2 + 0.1 * torch.randn(20, 70, generator=seeded(8))
    lists = ([B, B_2], [A, A_2], [W_s, W_2], [W_t, W_3])
    for move in (lk.anchor_lora, lk.restore_lora):
        many = move(*lists, scale=[1.0, 2.0])
        for i, scale in enumerate((1.0, 2.0)):
            single = move(*(x[i] for x in lists), scale=scale)
            torch.testing.assert_close(many[0][i], single[0])
            torch.testing.assert_close(many[1][i], single[1])
        assert move([], [], [], []) == ([], [])


def test_rows_come_a_few_at_a_time_and_add_up(layer, monkeypatch):
    want = lk.anchor_lora(*layer, sides="both")
    monkeypatch.setattr("lorax_kernels.drift._CHUNK_BYTES", 4 * N * 10)
    got = lk.anchor_lora(*layer, sides="both")
    assert relative(got[0] @ got[1], want[0] @ want[1]) < 1e-6


BAD = {
    "sides": ({"sides": "left"}, "sides must be one of"),
    "strength": ({"strength": 1.5}, r"share in \[0, 1\], got 1.5"),
    "scale": ({"scale": 0.0}, "scale is 0"),
    "rank of one side": ({"rank": 3}, "keeps the rank"),
    "rank": ({"rank": 0, "sides": "both"}, "at least 1, got 0"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_options_out_of_range_are_refused(layer, options, message):
    with pytest.raises(ValueError, match=message):
        lk.anchor_lora(*layer, **options)


def test_arguments_that_do_not_fit_are_refused(layer):
    B, A, W_s, W_t = layer
    with pytest.raises(ValueError, match="one shape"):
        lk.anchor_lora(B, A, W_s, W_t[:, :-1])
    with pytest.raises(ValueError, match="all single or all lists"):
        lk.anchor_lora([B], [A], [W_s], W_t)
    with pytest.raises(ValueError, match="lengths"):
        lk.restore_lora([B], [A], [W_s], [W_t], scale=[1.0, 2.0])
    with pytest.raises(ValueError, match="must have 63 rows"):
        lk.drift_product(W_s, W_t, A.T, transpose=True)
    with pytest.raises(ValueError, match="matrices of one shape"):
        lk.drift_product(W_s, W_t.T, A.T)
    with pytest.raises(ValueError, match="directions must be at least 1"):
        lk.restore_lora(B, A, W_s, W_t, directions=0)
