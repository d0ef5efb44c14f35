# SPDX-License-Identifier: Apache-2.0
"""`project` on any machine: the reference against float64."""

import pytest
import torch
from project_cases import BASES, DTYPES, SHAPES, errors, make_layers

import lorax_kernels as lk
from lorax_kernels import _backends
from lorax_kernels.ops import project


@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize(
    ("read", "write"),
    [
        ("bf16", "fp32"),
        ("fp32", "fp64"),
        ("fp64", "fp64"),
        ("2xbf16", "2xbf16"),
        ("2xbf16", "fp32"),
    ],
)
def test_reference(factor, read, write):
    """A float64 block is worth float64 sums, whatever its bases."""
    generator = torch.Generator().manual_seed(3)
    layers = make_layers(SHAPES, DTYPES[factor], BASES[read], BASES[write], generator)
    results = project(*layers)
    for (found, limit), X, B in zip(errors(results, layers), results, layers[0], strict=True):
        assert found <= limit
        assert X.dtype == B.dtype


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", [(63, 17), (3, 63, 17)], ids=["matrix", "stack"])
def test_split(dtype, shape):
    """Each piece rounds what is left by at most 2^-8; nothing is left of float16's 11 bits."""
    X = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).to(
        dtype
    )
    pieces = lk.split_bfloat16(X)
    assert pieces.dtype == torch.bfloat16
    assert pieces.shape == (*shape[:-2], 2, *shape[-2:])
    lost = (pieces.double().sum(-3) - X.double()).abs() / X.double().abs()
    assert float(lost.max()) <= (2.0**-16 if dtype.itemsize > 2 else 0)
    assert torch.equal(pieces.select(-3, 0), X.bfloat16())


def test_pieces_are_nearer_to_a_basis():
    """What is lost of a projection onto a float32 basis: 2^-17 of it instead of 2^-8."""
    generator = torch.Generator().manual_seed(6)
    blocks, bases, _ = make_layers(
        [(300, 300, 40, 5)], torch.float32, torch.float32, None, generator
    )
    exact = project(blocks, bases)[0]
    lost = {
        name: float((project(blocks, [Q])[0] - exact).norm() / exact.norm())
        for name, Q in (("one", bases[0].bfloat16()), ("two", lk.split_bfloat16(bases[0])))
    }
    assert lost["two"] < 2.0**-17
    assert lost["one"] > 100 * lost["two"]


@pytest.mark.parametrize(
    ("basis", "message"),
    [
        (torch.ones(2, 4, 2), r"two bfloat16 pieces \(2, rows, rank\), got .* torch.float32"),
        (torch.ones(3, 4, 2).bfloat16(), r"\(3, 4, 2\)"),
        (torch.ones(4).bfloat16(), "must be matrices"),
        (torch.ones(2, 5, 2).bfloat16(), "rows of the block and of its read basis .* 4 and 5"),
    ],
    ids=["float32", "three", "vector", "rows"],
)
def test_bases_that_are_none(basis, message):
    with pytest.raises(ValueError, match=f"entry 0: .*{message}"):
        project([torch.ones(4, 2)], [basis])


def test_what_cannot_be_split():
    with pytest.raises(ValueError, match=r"a matrix or a stack of them, got shape \(3,\)"):
        lk.split_bfloat16(torch.ones(3))
    with pytest.raises(TypeError, match=r"must be floating point, got torch\.int64"):
        lk.split_bfloat16(torch.ones(3, 3).long())


def test_pieces_trace():
    """Shapes and dtypes without data, and what torch checks of an op."""
    generator = torch.Generator().manual_seed(7)
    layers = make_layers(SHAPES, torch.float16, BASES["2xbf16"], torch.float32, generator)
    op = torch.ops.lorax_kernels.project.default
    found = op(*[[x.to("meta") for x in group] for group in layers])
    for X, B, P in zip(found, layers[0], layers[2], strict=True):
        assert (X.shape, X.dtype, X.device.type) == ((len(P), B.shape[1]), B.dtype, "meta")
    torch.library.opcheck(op, tuple(group[1:3] for group in layers))


@pytest.mark.parametrize(
    ("factor", "read", "write", "is_taken"),
    [
        *[("fp32", "2xbf16", "2xbf16", True), ("fp16", "bf16", "2xbf16", True)],
        *[("bf16", "2xbf16", "fp32", True), ("fp16", "fp16", "fp16", True)],
        *[("fp32", "2xbf16", "fp32", False), ("fp64", "2xbf16", "2xbf16", False)],
        *[("fp32", "bf16", "bf16", False), ("fp16", "fp32", "fp32", False)],
    ],
)
def test_devices_that_are_slow_in_float64(factor, read, write, is_taken, monkeypatch):
    """The compiled kernels leave to others what they would sum in float64, and nothing else."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    generator = torch.Generator().manual_seed(8)
    layers = make_layers(SHAPES, DTYPES[factor], BASES[read], BASES[write], generator)
    reason = _backends._KERNELS["cuda"]["project"].refuses(*layers)
    assert reason is None if is_taken else "float64" in reason
