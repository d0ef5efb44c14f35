# SPDX-License-Identifier: Apache-2.0
"""merge: the sum against the dense one, through the files that it writes and through PEFT."""

import json

import pytest
import torch
from adapter_makers import (
    convnet,
    llama,
    load_adapter,
    plain_config,
    plain_tensors,
    save_adapter,
    write_files,
)
from pairs import everything_in
from test_cli import run
from test_resize import dense

import lorax_transfer
from lorax_transfer._adapter_commands import _spread
from lorax_transfer.adapters import read_adapter
from lorax_transfer.errors import MatchError, OutputError, TransferError


def random_tensors(rank, seed, modules=("fc", "proj"), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sides = {"fc": (8, 16), "proj": (16, 8)}
    tensors = {}
    for module in modules:
        out, inner = sides[module]
        stem = f"base_model.model.h.0.{module}"
        tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, inner, generator=generator).to(dtype)
        tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator).to(dtype)
    return tensors


@pytest.fixture
def two(tmp_path):
    """Two adapters of different rank and scale."""
    one = write_files(tmp_path / "one", plain_config(), plain_tensors())
    config = plain_config(r=3, lora_alpha=5, use_rslora=True)
    other = write_files(tmp_path / "other", config, random_tensors(3, 7))
    return [one, other]


def dense_sum(paths, weights):
    sums = {}
    for path, weight in zip(paths, weights, strict=True):
        for module, layer in read_adapter(path).layers.items():
            sums[module] = sums.get(module, 0) + weight * dense(layer)
    return sums


@pytest.mark.parametrize("weights", [None, [0.7, -1.5]], ids=["plain", "weighted"])
def test_the_sum_is_exact(two, tmp_path, weights):
    done = lorax_transfer.merge(two, tmp_path / "out", weights=weights)
    result = read_adapter(tmp_path / "out")
    exact = dense_sum(two, weights or [1, 1])
    assert list(result.layers) == list(exact)
    for module, layer in result.layers.items():
        assert layer.rank == 7
        error = float((dense(layer) - exact[module]).norm() / exact[module].norm())
        # One float32 rounding of lora_B.
        assert error < 2**-24
    assert all(x.error < 2**-24 for x in done.layers)
    assert [part.weight for part in done.inputs] == (weights or [1.0, 1.0])
    assert done.totals.energy_kept == pytest.approx(1.0, abs=1e-12)


def test_a_common_scale_carries_the_factors_bit_for_bit(tmp_path):
    paths = []
    for seed in (1, 2):
        tensors = random_tensors(4, seed, dtype=torch.bfloat16)
        paths.append(write_files(tmp_path / str(seed), plain_config(), tensors))
    done = lorax_transfer.merge(paths, tmp_path / "out")
    result = read_adapter(tmp_path / "out").layers["h.0.fc"]
    parts = [read_adapter(path).layers["h.0.fc"] for path in paths]
    assert torch.equal(result.lora_B, torch.cat([x.lora_B for x in parts], dim=1))
    assert torch.equal(result.lora_A, torch.cat([x.lora_A for x in parts]))
    assert result.scale == parts[0].scale
    assert done.totals.error < 1e-12


def test_rounding_in_bf16_is_reported(tmp_path):
    paths = []
    for seed in (1, 2):
        tensors = random_tensors(4, seed, dtype=torch.bfloat16)
        paths.append(write_files(tmp_path / str(seed), plain_config(), tensors))
    done = lorax_transfer.merge(paths, tmp_path / "out", weights=[0.3, 0.7])
    exact = dense_sum(paths, [0.3, 0.7])
    for record in done.layers:
        layer = read_adapter(tmp_path / "out").layers[record.module]
        assert layer.lora_B.dtype == torch.bfloat16
        wanted = exact[record.module]
        error = float((dense(layer) - wanted).norm() / wanted.norm())
        assert record.error == pytest.approx(error, rel=1e-6)
        # Rounding to eight bits is at most 2^-9 a number.
        assert 1e-4 < error < 2**-9 * 1.01


@pytest.mark.parametrize("cut", [{"rank": 3}, {"energy": 0.8}], ids=["rank", "energy"])
def test_recompression_is_the_best_of_its_rank(two, tmp_path, cut):
    done = lorax_transfer.merge(two, tmp_path / "out", weights=[1.0, 2.0], **cut)
    exact = dense_sum(two, [1.0, 2.0])
    result = read_adapter(tmp_path / "out")
    for record in done.layers:
        U, S, Vh = torch.linalg.svd(exact[record.module], full_matrices=False)
        k = record.rank
        assert record.rank_before == 7
        assert result.layers[record.module].rank == k
        best = (U[:, :k] * S[:k]) @ Vh[:k]
        torch.testing.assert_close(dense(result.layers[record.module]), best, rtol=1e-5, atol=1e-5)
        share = (S**2).cumsum(0) / (S**2).sum()
        assert record.energy_kept == pytest.approx(float(share[k - 1]), rel=1e-6)
        if "energy" in cut:
            assert share[k - 1] >= 0.8 > (share[k - 2] if k > 1 else 0)
        else:
            assert k == 3


def test_modules_of_some_only(tmp_path):
    # The first reaches one layer by its number, so that its configuration hides the others'.
    base = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    save_adapter(llama(), tmp_path / "one", **base, layers_to_transform=[1])
    save_adapter(llama(), tmp_path / "two", **{**base, "target_modules": ["q_proj", "up_proj"]})
    paths = [tmp_path / "one", tmp_path / "two"]
    done = lorax_transfer.merge(paths, tmp_path / "out", weights=[0.5, 2.0])
    exact = dense_sum(paths, [0.5, 2.0])
    assert {x.module for x in done.layers} == set(exact)
    loaded = load_adapter(llama(), tmp_path / "out")
    for module, wanted in exact.items():
        layer = loaded.get_submodule(f"base_model.model.{module}")
        got = layer.get_delta_weight("default").detach().double()
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert sum("lora_A.default" in name for name, _ in loaded.named_parameters()) == len(exact)


def test_convolutions(tmp_path):
    for i in (1, 2):
        save_adapter(convnet(), tmp_path / str(i), r=i + 1, target_modules=["conv", "head"])
    paths = [tmp_path / "1", tmp_path / "2"]
    lorax_transfer.merge(paths, tmp_path / "out", rank=4)
    layer = read_adapter(tmp_path / "out").layers["conv"]
    assert layer.lora_A.shape == (4, 3, 3, 3)
    load_adapter(convnet(), tmp_path / "out")(torch.randn(1, 3, 6, 6))


def test_wider_dtype_wins(tmp_path):
    one = write_files(tmp_path / "1", plain_config(), random_tensors(4, 1, dtype=torch.bfloat16))
    two = write_files(tmp_path / "2", plain_config(), random_tensors(4, 2, dtype=torch.float16))
    lorax_transfer.merge([one, two], tmp_path / "out")
    assert read_adapter(tmp_path / "out").layers["h.0.fc"].lora_A.dtype == torch.float32


def test_the_same_adapter_twice_folds_back(two, tmp_path):
    done = lorax_transfer.merge([two[0]] * 2, tmp_path / "out", weights=[3.0, -1.0], energy=1.0)
    assert {x.rank for x in done.layers} == {4}
    wanted = dense_sum([two[0]], [2.0])
    for module, layer in read_adapter(tmp_path / "out").layers.items():
        torch.testing.assert_close(dense(layer), wanted[module], rtol=1e-5, atol=1e-5)


def test_opposite_adapters_cancel_to_zero(two, tmp_path):
    done = lorax_transfer.merge([two[0]] * 2, tmp_path / "out", weights=[1.0, -1.0], rank=2)
    # Cancelled to rounding, or exactly: either way there is next to nothing left.
    scale = max(x.update_norm for x in lorax_transfer.merge([two[0]] * 2, dry_run=True).layers)
    for layer in read_adapter(tmp_path / "out").layers.values():
        assert float(dense(layer).norm()) < 1e-6 * scale
    json.loads(done.to_json())


def test_different_bases_are_a_warning(tmp_path):
    paths = []
    for i in (1, 2):
        config = plain_config(base_model_name_or_path=f"org/base-{i}")
        paths.append(write_files(tmp_path / str(i), config, plain_tensors()))
    done = lorax_transfer.merge(paths, tmp_path / "out")
    assert "org/base-1, org/base-2" in done.warnings[0]
    assert read_adapter(tmp_path / "out").base_model == "org/base-1"


def test_other_shapes_are_refused(two, tmp_path):
    tensors = {name: x.T.contiguous() for name, x in random_tensors(3, 1).items()}
    renamed = {
        name.replace("lora_A", "x").replace("lora_B", "lora_A").replace("x.", "lora_B."): x
        for name, x in tensors.items()
    }
    odd = write_files(tmp_path / "odd", plain_config(r=3), renamed)
    before = everything_in(tmp_path)
    with pytest.raises(MatchError, match=r"8 x \(16,\) in one adapter and 16 x \(8,\)"):
        lorax_transfer.merge([two[0], odd], tmp_path / "out")
    flipped = write_files(tmp_path / "flip", plain_config(fan_in_fan_out=True), plain_tensors())
    with pytest.raises(MatchError, match="fan_in_fan_out"):
        lorax_transfer.merge([two[0], flipped], tmp_path / "out")
    assert set(before) <= set(everything_in(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1.0]}, TransferError, r"weights are \[1.0\] for 2 adapters"),
        ({"weights": [1.0, 0.0]}, TransferError, "other than 0"),
        ({"weights": [1.0, float("nan")]}, TransferError, "finite"),
        ({"rank": 0}, TransferError, "1 or more"),
        ({"output": None}, OutputError, "no output"),
    ],
    ids=["count", "zero", "nan", "rank", "output"],
)
def test_bad_options(two, tmp_path, options, error, message):
    options = {"output": tmp_path / "out", **options}
    with pytest.raises(error, match=message):
        lorax_transfer.merge(two, **options)
    assert not (tmp_path / "out").exists()


def test_one_adapter_is_not_enough(two, tmp_path):
    for given in (two[:1], [], str(two[0])):
        with pytest.raises(TransferError, match="two or more"):
            lorax_transfer.merge(given, tmp_path / "out")


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("a b --weights 1 0.5 -o x", "a b --weights 1 --weights 0.5 -o x"),
        ("--weights 1 -0.5 -- a b", "--weights 1 --weights -0.5 -- a b"),
        ("--weights 1 --weights 2 a", "--weights 1 --weights 2 a"),
        ("a --rank 3 --weights 1e-1 2 --rank 4", "a --rank 3 --weights 1e-1 --weights 2 --rank 4"),
        ("--weights", "--weights"),
        ("--weights=1 a", "--weights=1 a"),
    ],
)
def test_weights_take_all_numbers_that_follow(given, wanted):
    assert _spread(given.split()) == wanted.split()


def test_command_line(two, tmp_path):
    arguments = ["merge", *two, "--weights", 0.25, -0.5, "-o", tmp_path / "out"]
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert "Wrote 2 layers" in result.stdout
    result = run(*arguments, "--overwrite", "--rank", 2, "--json")
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["kind"] == "merge"
    assert data["settings"]["weights"] == [0.25, -0.5]
    assert {x["rank"] for x in data["layers"]} == {2}
    result = run("merge", two[0], "-o", tmp_path / "x")
    assert result.exit_code == 1
    assert "two or more" in result.stderr
    assert not (tmp_path / "x").exists()
