# SPDX-License-Identifier: Apache-2.0
"""Bases and their cache: the same triplets again, by content, and never a broken one."""

import logging

import oracle
import pytest
import torch
from adapter_makers import llama
from pairs import make_pair
from safetensors.torch import load_file, save_file

import lorax_kernels as lk
import lorax_transfer
from lorax_transfer.bases import BasisMaker
from lorax_transfer.errors import OutputError

TOL = 1e-3


@pytest.fixture
def weights():
    return [torch.randn(24, 40), torch.randn(16, 16), torch.randn(24, 40)]


def make(weights, cache, ranks=(5, 4, 5), **options):
    return BasisMaker(TOL, cache=cache).make(weights, ranks, **options)


def same(a, b):
    return all(torch.equal(getattr(a.svd, name), getattr(b.svd, name)) for name in "USV")


@pytest.mark.parametrize("ranks", [(5, 4, 5), (5, 4, 9)], ids=["equal", "mixed"])
def test_each_weight_gets_its_own_basis(weights, ranks):
    for weight, rank, basis in zip(weights, ranks, make(weights, None, ranks), strict=True):
        U, _, V = oracle.exact_svd(weight, rank)
        assert oracle.projector_error(basis.svd.U, U) < TOL
        assert oracle.projector_error(basis.svd.V, V) < TOL
        assert not basis.is_cached


def test_second_time_is_read(weights, tmp_path, monkeypatch):
    first = make(weights, tmp_path)
    monkeypatch.setattr(lk, "truncated_svd", lambda *_, **__: pytest.fail("computed again"))
    second = make(weights, tmp_path)
    assert all(basis.is_cached for basis in second)
    for a, b in zip(first, second, strict=True):
        assert same(a, b)
        assert (a.svd.error, a.svd.passes, a.svd.path) == (b.svd.error, b.svd.passes, b.svd.path)


def test_stored_in_float32(weights, tmp_path):
    make([weights[0].bfloat16()], tmp_path, ranks=[5])
    [file] = tmp_path.iterdir()
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


@pytest.mark.parametrize("change", ["value", "rank", "energy", "dtype", "tol"])
def test_another_question_is_another_entry(weights, tmp_path, change):
    make([weights[0]], tmp_path, ranks=[5])
    weight, rank, energy, tol = weights[0].clone(), 5, None, TOL
    if change == "value":
        weight[3, 3] += 1e-3
    elif change == "rank":
        rank = 6
    elif change == "energy":
        energy = 0.1
    elif change == "dtype":
        weight = weight.double()
    else:
        tol = 2 * TOL
    [basis] = BasisMaker(tol, cache=tmp_path).make([weight], [rank], energy)
    assert not basis.is_cached
    assert len(list(tmp_path.iterdir())) == 2


def spoil(file, how):
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-7])
    elif how == "empty":
        file.write_bytes(b"")
    else:
        tensors = load_file(file)
        if how == "nan":
            tensors["U"][0, 0] = float("nan")
        elif how == "shape":
            tensors["V"] = tensors["V"][:-1].contiguous()
        elif how == "missing":
            del tensors["S"]
        facts = None if how == "no-metadata" else {"error": "0", "passes": "1", "path": "exact"}
        save_file(tensors, file, facts)


@pytest.mark.parametrize("how", ["truncated", "empty", "nan", "shape", "missing", "no-metadata"])
def test_broken_entry_is_computed_again(weights, tmp_path, how, caplog):
    [first] = make(weights[:1], tmp_path, ranks=[5])
    [file] = tmp_path.iterdir()
    spoil(file, how)
    with caplog.at_level(logging.WARNING):
        [second] = make(weights[:1], tmp_path, ranks=[5])
    assert same(first, second)
    assert not second.is_cached
    assert "computed again" in caplog.text
    [third] = make(weights[:1], tmp_path, ranks=[5])
    assert third.is_cached


def test_cache_that_cannot_be_written_is_one_sentence(weights, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        make(weights[:1], tmp_path / "file", ranks=[5])


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_transfer_uses_it(tmp_path, how, monkeypatch):
    pair = make_pair(tmp_path, llama, target_modules=["q_proj"])
    cache = tmp_path / "cache"
    if how == "environment":
        monkeypatch.setenv("LORAX_TRANSFER_CACHE", str(cache))
    options = {"cache": cache} if how == "argument" else {}
    first, second = (
        lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8, **options)
        for _ in range(2)
    )
    for a, b in zip(first.layers, second.layers, strict=True):
        assert not a.source_basis.is_cached
        assert b.source_basis.is_cached
        assert b.target_basis.is_cached
        assert a.outcomes == b.outcomes


def test_no_cache_unless_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LORAX_TRANSFER_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    pair = make_pair(tmp_path, llama, target_modules=["q_proj"])
    lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=8)
    assert not (tmp_path / "home").exists()
