# SPDX-License-Identifier: Apache-2.0
"""Embedding tables that are given back: exact directions, a few rows at a time."""

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import drift


def tables(rows=300, width=17, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    source = torch.randn(rows, width, generator=g, dtype=torch.float64)
    # Directions that are told apart, of a drift of some per cent.
    D = torch.randn(rows, width, generator=g, dtype=torch.float64) * 0.7 ** torch.arange(width)
    return source.to(dtype), (source + 0.05 * D).to(dtype)


@pytest.mark.parametrize("strength", [1.0, 0.5, 0.0], ids=str)
@pytest.mark.parametrize("directions", [1, 5, 17, 40], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_directions_are_undone(monkeypatch, directions, strength, dtype):
    source, target = tables(dtype=dtype)
    monkeypatch.setattr(drift, "_CHUNK_BYTES", 4 * 17 * 7)
    B, A = lk.restore_embedding(source, target, directions=directions, strength=strength)
    rank = min(directions, 17)
    assert (B.shape, A.shape) == ((300, rank), (rank, 17))
    assert B.dtype == A.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    U, S, Vh = torch.linalg.svd(target.double() - source.double(), full_matrices=False)
    expected = -strength * (U[:, :rank] * S[:rank]) @ Vh[:rank]
    # Rounding of float32 products, beside a difference of the size of S[0].
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert (B.double() @ A.double() - expected).norm() <= tolerance * S[0] * 17


def test_equal_tables_give_nothing():
    source, _ = tables()
    B, A = lk.restore_embedding(source, source.clone())
    assert B.abs().max() == 0
    assert torch.isfinite(A).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": 0}, "directions must be"),
        ({"strength": 1.1}, "strength must be"),
        ({"strength": float("nan")}, "strength must be"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lk.restore_embedding(*tables(), **options)
    with pytest.raises(ValueError, match="one shape"):
        lk.restore_embedding(torch.ones(3, 2), torch.ones(4, 2))
