# SPDX-License-Identifier: Apache-2.0
"""resize: against the SVD of the dense update, through the files that it writes."""

import json
import math

import pytest
import torch
from adapter_makers import (
    convnet,
    gpt2,
    llama,
    load_adapter,
    plain_config,
    plain_tensors,
    save_adapter,
    write_files,
)
from pairs import everything_in
from test_cli import run

import lorax_transfer
from lorax_transfer.adapters import read_adapter
from lorax_transfer.errors import AdapterError, OutputError, TransferError


def dense(layer):
    return layer.scale * layer.matrix_B.double() @ layer.matrix_A.double()


@pytest.fixture
def adapter(tmp_path):
    return write_files(tmp_path / "in", plain_config(), plain_tensors())


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_every_layer_is_the_best_of_its_rank(tmp_path, rslora):
    config = plain_config(use_rslora=rslora, alpha_pattern={"h.0.proj": 3})
    source = read_adapter(write_files(tmp_path / "in", config, plain_tensors()))
    done = lorax_transfer.resize(tmp_path / "in", tmp_path / "out", rank=2)
    result = read_adapter(tmp_path / "out")
    for record in done.layers:
        before, after = source.layers[record.module], result.layers[record.module]
        U, S, Vh = torch.linalg.svd(dense(before), full_matrices=False)
        # Float32 factors of a result near one.
        torch.testing.assert_close(dense(after), (U[:, :2] * S[:2]) @ Vh[:2], rtol=1e-5, atol=1e-6)
        assert after.scale == pytest.approx(before.scale, rel=1e-15)
        assert (record.rank_before, record.rank) == (4, 2)
        energy = float((S[:2] ** 2).sum() / (S**2).sum())
        assert record.energy_kept == pytest.approx(energy, rel=1e-6)
        assert record.spectral_error == pytest.approx(float(S[2] / S[0]), rel=1e-5)
        assert record.error == pytest.approx(math.sqrt(1 - energy), rel=1e-4)
        assert record.update_norm == pytest.approx(float(dense(before).norm()), rel=1e-6)
    assert done.totals.parameters * 2 == done.totals.parameters_before


def test_energy_gives_every_layer_its_own_rank(tmp_path):
    tensors = plain_tensors()
    # One strong direction in fc, four equal ones in proj.
    stem = "base_model.model.h.0"
    tensors[f"{stem}.fc.lora_B.weight"][:, 0] *= 100
    tensors[f"{stem}.proj.lora_A.weight"] = torch.eye(4, 8)
    tensors[f"{stem}.proj.lora_B.weight"] = torch.eye(16, 4)
    write_files(tmp_path / "in", plain_config(), tensors)
    done = lorax_transfer.resize(tmp_path / "in", tmp_path / "out", energy=0.74)
    assert {x.module: x.rank for x in done.layers} == {"h.0.fc": 1, "h.0.proj": 3}
    assert all(x.energy_kept >= 0.74 for x in done.layers)
    assert {name: x.rank for name, x in read_adapter(tmp_path / "out").layers.items()} == {
        "h.0.fc": 1,
        "h.0.proj": 3,
    }
    both = lorax_transfer.resize(tmp_path / "in", energy=0.74, rank=2, dry_run=True)
    assert {x.module: x.rank for x in both.layers} == {"h.0.fc": 1, "h.0.proj": 2}


def test_a_share_of_one_drops_what_is_empty(tmp_path):
    tensors = plain_tensors()
    for name in tensors:
        if "lora_B" in name:
            tensors[name][:, 2:] = 0
    write_files(tmp_path / "in", plain_config(), tensors)
    done = lorax_transfer.resize(tmp_path / "in", tmp_path / "out", energy=1.0)
    assert {x.rank for x in done.layers} == {2}
    assert done.totals.error < 1e-6


@pytest.mark.parametrize("base", [llama, gpt2], ids=lambda x: x.__name__)
def test_peft_computes_with_the_result(tmp_path, base):
    targets = ["c_attn"] if base is gpt2 else ["q_proj", "down_proj"]
    config = {"r": 6, "lora_alpha": 9, "target_modules": targets, "fan_in_fan_out": base is gpt2}
    save_adapter(base(), tmp_path / "in", **config)
    lorax_transfer.resize(tmp_path / "in", tmp_path / "out", rank=6)
    ids = torch.arange(8)[None]
    wanted = load_adapter(base(), tmp_path / "in")(ids).logits
    assert torch.equal(load_adapter(base(), tmp_path / "out")(ids).logits, wanted)
    lorax_transfer.resize(tmp_path / "in", tmp_path / "out", energy=1.0, overwrite=True)
    got = load_adapter(base(), tmp_path / "out")(ids).logits
    # Other factors of the same update: float32 rounding through the model.
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    lorax_transfer.resize(tmp_path / "in", tmp_path / "out", rank=1, overwrite=True)
    assert not torch.allclose(load_adapter(base(), tmp_path / "out")(ids).logits, wanted, atol=1e-3)


def test_convolutions_keep_their_kernels(tmp_path):
    save_adapter(convnet(), tmp_path / "in", r=4, lora_alpha=8, target_modules=["conv", "head"])
    lorax_transfer.resize(tmp_path / "in", tmp_path / "out", rank=3)
    image = torch.randn(1, 3, 6, 6)
    load_adapter(convnet(), tmp_path / "out")(image)
    layer = read_adapter(tmp_path / "out").layers["conv"]
    assert (layer.lora_A.shape, layer.lora_B.shape) == ((3, 3, 3, 3), (8, 3, 1, 1))


def test_a_zero_update_stays_zero(tmp_path):
    tensors = plain_tensors()
    tensors["base_model.model.h.0.fc.lora_B.weight"].zero_()
    write_files(tmp_path / "in", plain_config(), tensors)
    done = lorax_transfer.resize(tmp_path / "in", tmp_path / "out", rank=2)
    record = next(x for x in done.layers if x.module == "h.0.fc")
    assert (record.rank, record.energy_kept, record.error) == (2, None, None)
    assert record.reason == "the update is zero"
    assert bool((dense(read_adapter(tmp_path / "out").layers["h.0.fc"]) == 0).all())
    assert done.totals.energy_kept < 1
    json.loads(done.to_json())


@pytest.mark.parametrize("dtype", ["auto", "fp32", "bf16", "fp16"])
def test_dtypes_and_the_rounding_they_cost(tmp_path, dtype):
    tensors = {name: x.bfloat16() for name, x in plain_tensors().items()}
    write_files(tmp_path / "in", plain_config(), tensors)
    done = lorax_transfer.resize(tmp_path / "in", tmp_path / "out", rank=2, dtype=dtype)
    names = {"auto": torch.bfloat16, "fp32": torch.float32, "bf16": torch.bfloat16}
    source, result = read_adapter(tmp_path / "in"), read_adapter(tmp_path / "out")
    for record in done.layers:
        after = result.layers[record.module]
        assert after.lora_A.dtype == names.get(dtype, torch.float16)
        exact = dense(source.layers[record.module])
        error = float((dense(after) - exact).norm() / exact.norm())
        assert record.error == pytest.approx(error, rel=1e-6)


def test_unchanged_layers_are_carried_bit_for_bit(adapter, tmp_path):
    done = lorax_transfer.resize(adapter, tmp_path / "out", rank=4)
    assert "nothing was cut" in done.warnings[0]
    assert {x.reason for x in done.layers} == {"already of rank 4"}
    before, after = read_adapter(adapter), read_adapter(tmp_path / "out")
    for module, layer in before.layers.items():
        assert torch.equal(layer.lora_A, after.layers[module].lora_A)
        assert torch.equal(layer.lora_B, after.layers[module].lora_B)
    assert done.totals.error == 0


def test_writing_twice_gives_the_same_bytes(adapter, tmp_path):
    for name in ("one", "two"):
        lorax_transfer.resize(adapter, tmp_path / name, rank=2)
    for file in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_provenance_and_card(adapter, tmp_path):
    lorax_transfer.resize(adapter, tmp_path / "out", rank=2, command="lorax-transfer resize x")
    metadata = read_adapter(tmp_path / "out").metadata
    assert metadata["lorax_transfer.method"] == "resize"
    assert metadata["lorax_transfer.rank"] == "2"
    assert metadata["lorax_transfer.adapter_0_hash"].startswith("sha256:")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "lorax-transfer resize x" in card
    assert "library_name: peft" in card


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, TransferError, "neither rank nor energy"),
        ({"rank": 0}, TransferError, "expected 1 or more"),
        ({"energy": 1.5}, TransferError, r"\(0, 1\]"),
        ({"rank": 2, "dtype": "int8"}, TransferError, "int8"),
        ({"rank": 2, "device": "tpu"}, TransferError, "tpu"),
        ({"rank": 2, "report": "report.txt"}, OutputError, r"\.json"),
    ],
    ids=["nothing", "rank", "energy", "dtype", "device", "report"],
)
def test_bad_options_leave_nothing(adapter, tmp_path, options, error, message):
    before = everything_in(tmp_path)
    with pytest.raises(error, match=message):
        lorax_transfer.resize(adapter, tmp_path / "out", **options)
    assert everything_in(tmp_path) == before


def test_bad_input_leaves_nothing(adapter, tmp_path):
    before = everything_in(tmp_path)
    with pytest.raises(AdapterError, match="does not exist"):
        lorax_transfer.resize(tmp_path / "none", tmp_path / "out", rank=2)
    with pytest.raises(OutputError, match="already exists"):
        lorax_transfer.resize(adapter, adapter, rank=2)
    with pytest.raises(OutputError, match="no output"):
        lorax_transfer.resize(adapter, rank=2)
    assert everything_in(tmp_path) == before


def test_interruption_leaves_nothing(adapter, tmp_path, monkeypatch):
    from lorax_transfer.adapters import files

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    before = everything_in(tmp_path)
    monkeypatch.setattr(files, "write_peft", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lorax_transfer.resize(adapter, tmp_path / "out", rank=2)
    assert everything_in(tmp_path) == before


def test_command_line(adapter, tmp_path):
    result = run("resize", adapter, "--rank", 2, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "h.0.*" in result.stdout
    assert "Wrote 2 layers" in result.stdout
    result = run(
        *("resize", adapter, "--energy", 0.9, "--rank", 3, "--dtype", "fp16", "--json"),
        *("--report", tmp_path / "r.json", "-o", tmp_path / "out", "--overwrite"),
    )
    assert result.exit_code == 0, result.output
    data = json.loads(result.stdout)
    assert data["schema"] == "lorax-transfer-recompression/1"
    assert data == json.loads((tmp_path / "r.json").read_text())
    assert data["settings"] == {"rank": 3, "energy": 0.9, "dtype": "fp16", "drop": []}
    assert data["command"].startswith("lorax-transfer ")


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--rank", 2], 2, "--output"),
        (["-o", "out"], 2, "--rank"),
        (["--rank", 2, "-o", "{tmp}/in"], 1, "already exists"),
    ],
    ids=["output", "cut", "exists"],
)
def test_command_line_errors(adapter, tmp_path, more, code, message):
    more = [str(x).format(tmp=tmp_path) for x in more]
    result = run("resize", adapter, *more)
    assert result.exit_code == code
    assert message in result.stderr
    assert "Traceback" not in result.output
