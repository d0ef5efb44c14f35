# SPDX-License-Identifier: Apache-2.0
"""From files to files: stock PEFT computes with the output what the equations say in float64."""

import json
import os
from pathlib import Path

import peft
import pytest
import torch
import transformers
from adapter_makers import convnet, gpt2, llama, randomise, save_adapter
from pairs import (
    expected,
    make_pair,
    rename_tensors,
    run_model,
    save_model,
    updates,
    with_adapter,
    with_updates,
    write_gguf,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lorax_transfer
from lorax_transfer.adapters import read_adapter
from lorax_transfer.checkpoints import open_checkpoint
from lorax_transfer.errors import MatchError, TransferError
from lorax_transfer.settings import METHODS

# Factors are written in float32 (6e-8) and small weights decomposed exactly; the bases' vectors
# carry 1e-6 of float32 rounding, which a few layers add up and nothing amplifies.
CLOSE = 2e-5
# The methods between models of one shape; test_aligned.py has the other.
ALIKE = [method for method in METHODS if method != "aligned"]

ATTENTION = ["q_proj", "v_proj"]
PATTERNS = {
    "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 5},
    "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "up_proj": 1},
}
MODELS = {
    "llama": (llama, {"target_modules": ATTENTION}),
    "llama-all-linear": (llama, {"target_modules": "all-linear", "use_rslora": True}),
    "llama-patterns": (llama, {"target_modules": [*ATTENTION, "up_proj"], **PATTERNS}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "fan_in_fan_out": True}),
    "conv": (convnet, {"target_modules": ["conv", "head"], "r": 2}),
}


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def check_output(pair, output: Path, method: str, rank: int) -> None:
    """The adapter, loaded by stock PEFT, against the equations added to the weights."""
    wanted = run_model(with_updates(pair.target_model, expected(pair, method, rank)))
    got = run_model(with_adapter(pair.target_model, output))
    assert relative_error(got, wanted) < CLOSE
    # Not so by chance: without the adapter the model computes something else.
    assert relative_error(run_model(pair.target_model.double()), wanted) > 100 * CLOSE


@pytest.mark.parametrize("method", ALIKE)
@pytest.mark.parametrize("name", MODELS)
def test_output_is_what_the_equations_say(tmp_path, name, method):
    make, lora = MODELS[name]
    pair = make_pair(tmp_path, make, **lora)
    rank = 5 if name == "conv" else 12
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", method=method, rank=rank
    )
    assert {layer.status for layer in report.layers} == {"transferred"}
    check_output(pair, tmp_path / "out", method, rank)


def test_report_says_what_happened_to_the_update(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=12)
    before = updates(pair.source_model, pair.adapter)
    for method in ALIKE:
        after = expected(pair, method, 12)
        for layer in report.layers:
            dW, moved = before[layer.module], after[layer.module]
            outcome = layer.outcomes[method]
            assert layer.update_norm == pytest.approx(float(dW.norm()), rel=1e-5)
            assert outcome.norm_ratio == pytest.approx(float(moved.norm() / dW.norm()), rel=1e-4)
            assert outcome.energy_kept == pytest.approx(outcome.norm_ratio**2)
            # The difference of nearly equal numbers: absolute, as the copy's is zero.
            change = float((moved - dW).norm() / dW.norm())
            assert outcome.change == pytest.approx(change, abs=1e-4)
    for layer in report.layers:
        weights = [
            model.get_submodule(layer.module).weight.detach().double()
            for model in (pair.source_model, pair.target_model)
        ]
        drift = float((weights[1] - weights[0]).norm() / weights[0].norm())
        assert layer.drift == pytest.approx(drift, rel=1e-6)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("method", ["anchor", "restore"])
def test_an_update_of_zero_stays_so(tmp_path, method):
    """There is nothing that drift could stand in the way of, so none of it is undone."""
    pair = make_pair(tmp_path, llama, target_modules=["q_proj"])
    factors = load_file(pair.adapter / "adapter_model.safetensors")
    name = next(key for key in factors if "layers.1" in key and "lora_B" in key)
    factors[name] = torch.zeros_like(factors[name])
    save_file(factors, pair.adapter / "adapter_model.safetensors")
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", method=method, rank=8
    )
    moved = updates(pair.target_model, tmp_path / "out")
    assert float(moved["model.layers.0.self_attn.q_proj"].norm()) > 0
    assert float(moved["model.layers.1.self_attn.q_proj"].norm()) == 0
    assert "the update is zero" in report.layers[1].reason


def test_full_rank_on_the_same_model_is_the_identity(tmp_path):
    # Square weights: of a wide one, even all singular directions span a part of the inputs only.
    pair = make_pair(tmp_path, llama, target_modules=["q_proj", "o_proj"])
    report = lorax_transfer.transfer(pair.adapter, pair.source, pair.source, tmp_path / "out")
    before, after = (read_adapter(place).layers for place in (pair.adapter, tmp_path / "out"))
    for module, layer in before.items():
        for got, wanted in (
            (after[module].lora_A, layer.lora_A),
            (after[module].lora_B, layer.lora_B),
        ):
            assert relative_error(got, wanted) < 5e-6  # orthonormality of a float32 basis
    assert all(layer.drift == 0 for layer in report.layers)
    assert all("identical" in layer.reason for layer in report.layers)
    assert any("identical in every layer" in warning for warning in report.warnings)


def test_layers_keep_their_order(tmp_path):
    # Shapes alternate, and batches are by shape.
    pair = make_pair(tmp_path, llama, target_modules=["q_proj", "v_proj", "down_proj"])
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", exclude=r"0\.self_attn.q_proj"
    )
    wanted = list(read_adapter(pair.adapter).layers)
    assert [layer.module for layer in report.layers] == wanted
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_modules"] == [m for m in wanted if "0.self_attn.q_proj" not in m]


def test_copy_keeps_every_bit(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out", method="copy")
    before, after = (
        load_file(place / "adapter_model.safetensors") for place in (pair.adapter, tmp_path / "out")
    )
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_sharded_target(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    sharded = tmp_path / "sharded"
    save_model(pair.target_model, sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    lorax_transfer.transfer(pair.adapter, pair.source, sharded, tmp_path / "out", rank=12)
    check_output(pair, tmp_path / "out", "lorax", 12)


def test_gguf_source(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=["q_proj", "k_proj"])
    source = write_gguf(tmp_path / "source.gguf", pair.source_model)
    report = lorax_transfer.transfer(
        pair.adapter, source, pair.target, tmp_path / "out", method="prolora", rank=12
    )
    # Rows in llama.cpp's order would look like another model altogether.
    assert report.totals.drift == pytest.approx(0.2, rel=0.1)
    check_output(pair, tmp_path / "out", "prolora", 12)


def test_other_names_in_the_target(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    rename_tensors(pair.target, lambda name: f"language_model.{name}")
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", rank=12
    )
    assert report.source.rule == "exact"
    assert report.target.rule == "prefix 'language_model.' added"
    check_output(pair, tmp_path / "out", "lorax", 12)


def test_tied_output_layer_is_found(tmp_path):
    source, target = llama(tied=True), llama(tied=True)
    for model, path in ((source, "source"), (target, "target")):
        save_model(model, tmp_path / path)
    with pytest.warns(UserWarning, match="embedding"):
        save_adapter(
            source, tmp_path / "adapter", r=2, lora_alpha=2, target_modules=["q_proj", "lm_head"]
        )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as handle:
        names = list(handle.keys())
    drop = ["modules_to_save"] if any("base_layer" in name for name in names) else []
    report = lorax_transfer.scan(
        tmp_path / "adapter", tmp_path / "source", tmp_path / "target", drop=drop
    )
    [head] = [layer for layer in report.layers if layer.module == "lm_head"]
    assert head.target_tensor == "model.embed_tokens.weight"
    assert "tied" in report.target.rule


class TestOtherWidth:
    @pytest.fixture
    def pair(self, tmp_path):
        def wider():
            config = llama().config
            config.hidden_size, config.head_dim = 48, 12
            torch.manual_seed(5)
            return transformers.LlamaForCausalLM(config).eval()

        return make_pair(tmp_path, llama, target=wider(), target_modules=ATTENTION)

    def test_follows_the_published_formula_and_says_so(self, tmp_path, pair, caplog):
        report = lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "out", rank=8
        )
        assert not any(layer.is_validated for layer in report.layers)
        assert all("unvalidated" in layer.reason for layer in report.layers)
        assert any("no one has shown" in warning for warning in report.warnings)
        assert "no one has shown" in caplog.text
        assert report.recommendation.verdict == "do not"
        assert report.totals.methods.keys() == {"lorax"}
        # Coordinates copied index by index: the energy is what the source's subspaces hold.
        before = updates(pair.source_model, pair.adapter)
        after = updates(pair.target_model, tmp_path / "out")
        for layer in report.layers:
            weight = pair.source_model.get_submodule(layer.module).weight.detach().double()
            U, _, Vh = torch.linalg.svd(weight)
            dW = before[layer.module]
            inside = (U[:, :8].T @ dW @ Vh[:8].T).norm()
            assert float(after[layer.module].norm()) == pytest.approx(float(inside), rel=1e-4)
            energy = layer.outcomes["lorax"].energy_kept
            assert energy == pytest.approx(float((inside / dW.norm()) ** 2), rel=1e-4)

    @pytest.mark.parametrize("method", ["copy", "prolora"])
    def test_other_methods_are_refused(self, tmp_path, pair, method):
        with pytest.raises(MatchError, match=rf"method {method} needs equal shapes"):
            lorax_transfer.transfer(
                pair.adapter, pair.source, pair.target, tmp_path / "out", method=method
            )

    def test_strict_refuses_and_reports(self, tmp_path, pair):
        with pytest.raises(TransferError, match=r"strict: .*unvalidated; no adapter was written"):
            lorax_transfer.transfer(
                pair.adapter,
                pair.source,
                pair.target,
                tmp_path / "out",
                strict=True,
                report=tmp_path / "why.json",
            )
        assert not (tmp_path / "out").exists()
        why = json.loads((tmp_path / "why.json").read_text())
        assert why["totals"]["unvalidated"] == 4
        assert why["totals"]["transferred"] == 0
        assert {layer["status"] for layer in why["layers"]} == {"measured"}


class TestLayersLeftOut:
    @pytest.fixture
    def pair(self, tmp_path):
        return make_pair(tmp_path, llama, target_modules=ATTENTION)

    def test_below_the_similarity(self, tmp_path, pair):
        every = lorax_transfer.scan(pair.adapter, pair.source, pair.target, rank=4).layers
        limit = sorted(layer.similarity.smaller for layer in every)[2]
        report = lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "out", rank=4, min_similarity=limit
        )
        kept = {layer.module for layer in every if layer.similarity.smaller >= limit}
        assert {x.module for x in report.layers if x.status == "transferred"} == kept
        assert all("is below" in x.reason for x in report.layers if x.status == "left out")
        # Not zeroed: the written adapter does not target them at all.
        loaded = peft.PeftModel.from_pretrained(pair.target_model, tmp_path / "out")
        assert set(loaded.targeted_module_names) == kept
        assert report.totals.left_out == 2
        assert report.totals.energy_written < report.totals.methods["lorax"].energy_kept

    def test_strict(self, tmp_path, pair):
        with pytest.raises(TransferError, match=r"strict: .* is below 0\.99"):
            lorax_transfer.transfer(
                pair.adapter,
                pair.source,
                pair.target,
                tmp_path / "out",
                rank=4,
                min_similarity=0.99,
                strict=True,
            )

    def test_all_of_them_is_an_error(self, tmp_path, pair):
        with pytest.raises(TransferError, match="none of the 4 layers reaches a similarity of 1"):
            lorax_transfer.transfer(
                pair.adapter,
                pair.source,
                pair.target,
                tmp_path / "out",
                rank=4,
                min_similarity=1.0,
            )
        assert not (tmp_path / "out").exists()

    def test_excluded_by_name(self, tmp_path, pair):
        report = lorax_transfer.transfer(
            pair.adapter,
            pair.source,
            pair.target,
            tmp_path / "out",
            include=r"layers\.1\.",
            exclude="v_proj",
            strict=True,
        )
        assert list(read_adapter(tmp_path / "out").layers) == ["model.layers.1.self_attn.q_proj"]
        assert report.totals.excluded == 3
        reasons = {x.module: x.reason for x in report.layers if x.status == "excluded"}
        assert "--include" in reasons["model.layers.0.self_attn.v_proj"]
        assert "--exclude" in reasons["model.layers.1.self_attn.v_proj"]


def test_energy_decides_the_rank_of_each_layer(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=["q_proj", "down_proj"])
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.target, energy=0.5)
    for layer in report.layers:
        weight = pair.target_model.get_submodule(layer.module).weight.detach().double()
        squares = torch.linalg.svdvals(weight) ** 2
        kept = torch.cumsum(squares, 0) / squares.sum()
        assert layer.rank == int((kept < 0.5).sum()) + 1
        assert layer.source_basis.rank == layer.target_basis.rank == layer.rank
    capped = lorax_transfer.scan(pair.adapter, pair.source, pair.target, energy=0.5, rank=3)
    assert {layer.rank for layer in capped.layers} == {3}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("asked", ["auto", "fp16"])
def test_dtype_of_the_output(tmp_path, stored, asked):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    model = peft.PeftModel.from_pretrained(pair.source_model, pair.adapter).to(stored)
    randomise(model)
    model.save_pretrained(pair.adapter)
    lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out", dtype=asked)
    wanted = stored if asked == "auto" else torch.float16
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {wanted}


def test_provenance_and_card(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", rank=7, command="the command"
    )
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        facts = file.metadata()
    with open_checkpoint(pair.source) as source, open_checkpoint(pair.target) as target:
        hashes = source.content_hash(), target.content_hash()
    written = {key: facts[f"lorax_transfer.{key}"] for key in ("source_hash", "target_hash")}
    assert tuple(written.values()) == hashes
    adapter_hash = read_adapter(pair.adapter).content_hash
    assert facts["lorax_transfer.adapter_hash"] == adapter_hash
    assert facts["lorax_transfer.method"] == "lorax"
    assert facts["lorax_transfer.rank"] == "7"
    assert facts["lorax_transfer.command"] == "the command"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(pair.target)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in ("the command", "Energy kept by copy", "| Rank | 7 |", str(pair.source)):
        assert text in card


def test_same_input_gives_the_same_bytes(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    contents = []
    for _ in range(2):
        lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "out", rank=8, overwrite=True
        )
        contents.append({p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()})
    assert contents[0] == contents[1]


def test_files_get_the_mode_that_the_user_wants(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=["q_proj"])
    mask = os.umask(0o027)
    try:
        lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out", rank=8)
    finally:
        os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_dropped_content_is_named(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION, modules_to_save=["lm_head"])
    with pytest.raises(TransferError, match="--drop modules_to_save"):
        lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out")
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", drop="modules_to_save"
    )
    assert report.dropped_kinds == ("modules_to_save",)
    assert report.dropped == ("base_model.model.lm_head.weight",)
    assert report.settings["drop"] == ["modules_to_save"]


def test_zero_update(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=["q_proj"])
    model = peft.PeftModel.from_pretrained(pair.source_model, pair.adapter)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    model.save_pretrained(pair.adapter)
    report = lorax_transfer.transfer(pair.adapter, pair.source, pair.target, tmp_path / "out")
    assert all(x.outcomes == {} and "the update is zero" in x.reason for x in report.layers)
    assert report.totals.energy_written is None
    report.to_json()


def test_dry_run_reads_no_weight_and_writes_nothing(tmp_path, monkeypatch):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        "lorax_transfer.checkpoints._safetensors.SafetensorsCheckpoint.read",
        lambda *_: pytest.fail("a weight was read"),
    )
    report = lorax_transfer.transfer(pair.adapter, pair.source, pair.target, dry_run=True)
    assert report.kind == "plan"
    assert {layer.status for layer in report.layers} == {"planned"}
    assert {layer.rank for layer in report.layers} == {16, 32}
    assert report.memory_bytes > 0
    assert sorted(tmp_path.rglob("*")) == before


def test_progress_reaches_the_end(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    seen: list[tuple[str, int, int]] = []
    lorax_transfer.transfer(
        pair.adapter,
        pair.source,
        pair.target,
        tmp_path / "out",
        progress=lambda *step: seen.append(step),
    )
    assert [step for step in seen if step[0] == "layers"][-1] == ("layers", 4, 4)
    assert seen[-1] == ("hashing", 2, 2)


def test_interrupt_leaves_nothing(tmp_path):
    pair = make_pair(tmp_path, llama, target_modules=ATTENTION)
    before = sorted(tmp_path.rglob("*"))

    def interrupt(stage: str, done: int, count: int) -> None:
        if stage == "hashing":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "new" / "out", progress=interrupt
        )
    assert sorted(tmp_path.rglob("*")) == before
