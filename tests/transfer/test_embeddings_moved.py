# SPDX-License-Identifier: Apache-2.0
"""Adapters that are on embeddings, moved on: by stock PEFT's own reading of what was written."""

import copy
import json
import shutil

import pytest
import torch
from adapter_makers import llama
from pairs import (
    LANGUAGE,
    expected,
    language_pair,
    make_pair,
    perturb,
    run_model,
    save_model,
    updates,
    with_adapter,
)
from safetensors.torch import load_file, save_file
from test_transfer import ALIKE, CLOSE, relative_error

import lorax_transfer
from lorax_transfer.adapters import read_adapter
from lorax_transfer.errors import MatchError

WIDTH = 32
# PEFT writes a full copy of a table that it adapts.
DROP = ["modules_to_save"]
BOTH = pytest.mark.parametrize(
    ("name", "tied"), [("llama", True), ("gpt2", False)], ids=["llama-tied", "gpt2-untied"]
)
TABLES = {"llama": "model.embed_tokens", "gpt2": "transformer.wte"}


def transfer(pair, output, adapter=None, **options):
    """All directions of the drift, so that results are known exactly."""
    options = {"method": "copy", "directions": WIDTH, "drop": DROP, **options}
    return lorax_transfer.transfer(
        adapter or pair.adapter, pair.source, pair.target, output, **options
    )


def on_to(pair, place, model):
    """From the target of a pair to another model."""
    save_model(model, place)
    return type(pair)(pair.target, place, pair.adapter, pair.target_model, model)


def moved_again(pair, seed=3):
    model = copy.deepcopy(pair.target_model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.2 * noise * (parameter.norm() / noise.norm())
    return model


def table(model):
    return model.get_input_embeddings().weight.detach().double()


def head(model):
    return model.get_output_embeddings().weight.detach().double()


def close(got, wanted):
    assert got.keys() == wanted.keys()
    for module, update in wanted.items():
        assert relative_error(got[module], update) < CLOSE, module


def tying(adapter):
    return json.loads((adapter / "adapter_config.json").read_text())["ensure_weight_tying"]


@pytest.mark.parametrize("method", ALIKE)
@BOTH
def test_a_table_is_moved_as_the_matrix_that_it_is(tmp_path, name, tied, method):
    pair = language_pair(tmp_path, name, tied, LANGUAGE[name][2])
    before = updates(pair.source_model, pair.adapter)
    assert before[TABLES[name]].shape == (64, WIDTH)
    report = transfer(pair, tmp_path / "out", method=method, rank=12, directions=16)
    assert {x.status for x in report.layers} == {"transferred"}
    close(updates(pair.target_model, tmp_path / "out"), expected(pair, method, 12))
    assert tying(tmp_path / "out") is False


def test_what_was_given_back_comes_back_bit_by_bit(tmp_path):
    """To another base and home again: base 0, the adapter and the restoring update."""
    pair = language_pair(tmp_path, "llama", True)
    transfer(pair, tmp_path / "there", embeddings=1.0)
    home = on_to(pair, tmp_path / "again", pair.source_model)
    transfer(home, tmp_path / "back", tmp_path / "there")
    files = [tmp_path / x / "adapter_model.safetensors" for x in ("there", "back")]
    there, back = map(load_file, files)
    assert there.keys() == back.keys()
    assert all(torch.equal(there[name], back[name]) for name in there)
    assert tying(tmp_path / "back") is True
    wanted = updates(pair.source_model, pair.adapter)
    wanted[TABLES["llama"]] = wanted["lm_head"] = table(pair.source_model) - table(
        pair.target_model
    )
    close(updates(pair.source_model, tmp_path / "back"), wanted)


@pytest.mark.parametrize("method", ["copy", "lorax", "anchor", "restore"])
@BOTH
def test_two_moves_give_the_sum_back(tmp_path, name, tied, method):
    """What a table has is carried as it is beside what is given back, whatever the method."""
    pair = language_pair(tmp_path, name, tied)
    transfer(pair, tmp_path / "one", embeddings=0.5)
    onward = on_to(pair, tmp_path / "third", moved_again(pair))
    report = transfer(
        onward, tmp_path / "two", tmp_path / "one", method=method, rank=12, embeddings=1.0
    )
    found = updates(onward.target_model, tmp_path / "two")
    for module, get in ((TABLES[name], table), ("lm_head", head)):
        first, second, third = map(get, (pair.source_model, pair.target_model, onward.target_model))
        wanted = 0.5 * (first - second) + (second - third)
        assert relative_error(found[module], wanted) < CLOSE
    assert tying(tmp_path / "two") is tied
    by_module = {x.module: x for x in report.layers}
    for module in (TABLES[name], "lm_head"):
        assert by_module[module].method == "restore"
        assert by_module[module].outcome.drift_undone == pytest.approx(1, rel=1e-3)
        assert "100% of the drift given back" in by_module[module].reason
    assert f"Drift undone of {TABLES[name]}" in (tmp_path / "two" / "README.md").read_text()
    assert any("merging would add" in text for text in report.warnings) is tied


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_chain_of_moves_ends_at_the_first_embeddings(tmp_path, tied):
    """The logits of the last base with its embeddings replaced by the first one's."""
    pair = language_pair(tmp_path, "gpt2", tied)
    transfer(pair, tmp_path / "one", embeddings=1.0)
    onward = on_to(pair, tmp_path / "third", moved_again(pair))
    transfer(onward, tmp_path / "two", tmp_path / "one", embeddings=1.0)
    model = copy.deepcopy(onward.target_model)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table(pair.source_model))
        model.get_output_embeddings().weight.copy_(head(pair.source_model))
    wanted = run_model(with_adapter(model, pair.adapter))
    got = run_model(with_adapter(onward.target_model, tmp_path / "two"))
    assert relative_error(got, wanted) < CLOSE
    plain = run_model(with_adapter(onward.target_model, pair.adapter))
    assert relative_error(plain, wanted) > 100 * CLOSE


@pytest.mark.parametrize("kind", ["table", "output layer", "both", "untrained", "zero scale"])
def test_a_trained_table_gets_its_drift_back_on_top(tmp_path, kind):
    """Both ends of a tied model, whichever of them the adapter is on."""
    modules = {"output layer": ["lm_head"], "both": ["embed_tokens", "lm_head"]}
    more = modules.get(kind, ["embed_tokens"])
    options = {"alpha_pattern": {"embed_tokens": 0}} if kind == "zero scale" else {}
    pair = language_pair(tmp_path, "llama", True, *more, **options)
    if kind == "untrained":
        file = pair.adapter / "adapter_model.safetensors"
        tensors = load_file(file)
        name = next(x for x in tensors if x.endswith("lora_embedding_A"))
        tensors[name] = torch.zeros_like(tensors[name])
        save_file(tensors, file, {"format": "pt"})
    transfer(pair, tmp_path / "out", embeddings=0.5)
    wanted = updates(pair.source_model, pair.adapter)
    drift = table(pair.source_model) - table(pair.target_model)
    for module in (TABLES["llama"], "lm_head"):
        wanted[module] = wanted.get(module, 0) + 0.5 * drift
    close(updates(pair.target_model, tmp_path / "out"), wanted)
    # Unlike updates cannot be tied.
    assert tying(tmp_path / "out") is False


def test_nothing_is_added_where_nothing_moved(tmp_path):
    target = llama(True)
    perturb(target, 0.2)
    with torch.no_grad():
        target.get_input_embeddings().weight.copy_(llama(True).get_input_embeddings().weight)
    pair = make_pair(
        tmp_path, lambda: llama(True), target=target, target_modules=["q_proj", "embed_tokens"]
    )
    transfer(pair, tmp_path / "out", embeddings=1.0)
    layers = read_adapter(tmp_path / "out").layers
    assert "lm_head" not in layers
    assert layers[TABLES["llama"]].rank == 4


def test_an_adapter_that_peft_has_tied_stays_tied(tmp_path):
    pair = language_pair(tmp_path, "llama", True, "embed_tokens", ensure_weight_tying=True)
    assert "lm_head" in read_adapter(pair.adapter, drop=DROP).layers
    transfer(pair, tmp_path / "out", method="restore", directions=16)
    assert tying(tmp_path / "out") is True
    close(updates(pair.target_model, tmp_path / "out"), expected(pair, "restore", 12))
    found = updates(pair.target_model, tmp_path / "out")
    assert torch.equal(found["lm_head"], found[TABLES["llama"]])


def test_from_a_tied_model_to_one_that_is_not(tmp_path):
    pair = language_pair(tmp_path, "llama", True)
    transfer(pair, tmp_path / "one", embeddings=1.0)
    untied = llama(False)
    onward = on_to(pair, tmp_path / "third", untied)
    report = transfer(onward, tmp_path / "two", tmp_path / "one", embeddings=1.0)
    found = updates(untied, tmp_path / "two")
    first = table(pair.source_model)
    assert relative_error(table(untied) + found[TABLES["llama"]], first) < CLOSE
    assert relative_error(head(untied) + found["lm_head"], first) < CLOSE
    assert tying(tmp_path / "two") is False
    assert not any("merging" in text for text in report.warnings)


@pytest.mark.parametrize("says", ["nothing", "no file"])
def test_a_model_that_does_not_say_that_it_is_tied(tmp_path, says):
    pair = language_pair(tmp_path, "gpt2", True)
    transfer(pair, tmp_path / "one", embeddings=1.0)
    for place in (pair.source, pair.target):
        config = json.loads((place / "config.json").read_text())
        config.pop("tie_word_embeddings")
        (place / "config.json").write_text(json.dumps(config))
        if says == "no file":
            (place / "config.json").unlink()
    report = transfer(pair, tmp_path / "two", tmp_path / "one")
    assert "output layer tied" in report.source.rule
    assert tying(tmp_path / "two") is True


class TestRefusals:
    @pytest.fixture
    def pair(self, tmp_path):
        """From a vocabulary of 64 to one of 65, with an adapter on both ends."""
        pair = language_pair(tmp_path, "llama", True)
        transfer(pair, tmp_path / "one", embeddings=1.0)
        model = copy.deepcopy(pair.target_model)
        model.resize_token_embeddings(65, mean_resizing=False)
        onward = on_to(pair, tmp_path / "third", model)
        onward.adapter = tmp_path / "one"
        return onward

    @pytest.mark.parametrize("method", ["copy", "lorax", "aligned"])
    def test_another_vocabulary(self, tmp_path, pair, method):
        with pytest.raises(MatchError) as refusal:
            transfer(pair, tmp_path / "two", method=method)
        message = str(refusal.value)
        assert "model.embed_tokens is (64, 32) in the source and (65, 32)" in message
        assert "lm_head is (64, 32) in the source and (65, 32)" in message
        assert message.endswith("leave it behind with --drop embedding and --exclude 'lm_head'.")
        assert not (tmp_path / "two").exists()
        # And that is what to do.
        drop = [*DROP, "embedding"]
        transfer(pair, tmp_path / "two", method=method, rank=12, drop=drop, exclude="lm_head")
        kept = read_adapter(tmp_path / "two").layers
        assert kept.keys() == read_adapter(pair.adapter).layers.keys() - {
            TABLES["llama"],
            "lm_head",
        }

    def test_a_full_copy(self, tmp_path):
        pair = language_pair(tmp_path, "llama", False, "embed_tokens")
        with pytest.raises(lorax_transfer.errors.AdapterError) as refusal:
            transfer(pair, tmp_path / "out", drop=[])
        assert "embed_tokens.base_layer.weight" in str(refusal.value)
        assert "loses nothing of the copy that PEFT writes" in str(refusal.value)
        assert "--drop embedding" not in str(refusal.value)


def test_scan_says_the_same_with_the_embeddings_and_without(tmp_path):
    """Embeddings that moved farther than the layers are given back, the adapter's own too."""
    pair = language_pair(tmp_path, "llama", True)
    transfer(pair, tmp_path / "one", embeddings=1.0)
    model = copy.deepcopy(pair.target_model)
    perturb(model, 0.02)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.1)
    onward = on_to(pair, tmp_path / "third", model)
    found = [
        lorax_transfer.scan(adapter, onward.source, onward.target)
        for adapter in (pair.adapter, tmp_path / "one")
    ]
    assert [x.module for x in found[0].embeddings] == [TABLES["llama"], "lm_head"]
    assert found[1].embeddings == ()
    for name in ("drift", "drift_max", "embedding_drift", "untouched_drift"):
        assert getattr(found[1].totals, name) == pytest.approx(getattr(found[0].totals, name))
    assert "--embeddings 1" in found[0].recommendation.reason
    assert found[1].recommendation.verdict == found[0].recommendation.verdict == "restore"
    assert "--embeddings 1" in found[1].recommendation.reason
    planned = transfer(onward, None, tmp_path / "one", embeddings=1.0, dry_run=True)
    assert {x.method for x in planned.layers} == {"copy", "restore"}


def test_an_adapter_of_nothing_but_a_table(tmp_path):
    pair = make_pair(tmp_path, lambda: llama(False), target_modules=["embed_tokens"])
    report = transfer(pair, tmp_path / "out", method="transport")
    assert report.totals.drift == report.totals.embedding_drift == pytest.approx(0.2, rel=1e-3)
    close(updates(pair.target_model, tmp_path / "out"), expected(pair, "transport", WIDTH))


def test_resize_keeps_the_share_of_a_table_that_it_says(tmp_path):
    pair = language_pair(tmp_path, "gpt2", True)
    transfer(pair, tmp_path / "one", embeddings=1.0)
    before = updates(pair.target_model, tmp_path / "one")
    done = lorax_transfer.resize(tmp_path / "one", tmp_path / "small", energy=0.9)
    after = updates(pair.target_model, tmp_path / "small")
    records = {x.module: x for x in done.layers}
    for module in (TABLES["gpt2"], "lm_head"):
        energies = torch.linalg.svdvals(before[module]).square()
        shares = energies.cumsum(0) / energies.sum()
        record = records[module]
        assert record.rank_before == WIDTH
        assert record.rank == int((shares < 0.9).sum()) + 1
        assert record.energy_kept == pytest.approx(float(shares[record.rank - 1]), rel=1e-5)
        lost = (after[module] - before[module]).norm() ** 2 / before[module].norm() ** 2
        assert float(lost) == pytest.approx(1 - record.energy_kept, abs=1e-5)
    assert tying(tmp_path / "small") is True
    # What was cut moves on like any other.
    transfer(pair, tmp_path / "two", tmp_path / "small")
    close(updates(pair.target_model, tmp_path / "two"), after)


def test_merge_adds_tables(tmp_path):
    pair = language_pair(tmp_path, "llama", True)
    transfer(pair, tmp_path / "one", embeddings=1.0)
    transfer(pair, tmp_path / "half", embeddings=0.5)
    transfer(pair, tmp_path / "none")
    parts = [tmp_path / x for x in ("one", "half", "none")]
    lorax_transfer.merge(parts, tmp_path / "sum", weights=[1, -0.5, 2])
    of = [updates(pair.target_model, part) for part in parts]
    wanted = {
        module: of[0][module] - 0.5 * of[1][module] + 2 * of[2].get(module, 0) for module in of[0]
    }
    close(updates(pair.target_model, tmp_path / "sum"), wanted)
    assert tying(tmp_path / "sum") is True
    # With one end left out they are two different updates.
    shutil.copytree(tmp_path / "half", tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    save_file({k: x for k, x in load_file(file).items() if "lm_head" not in k}, file)
    lorax_transfer.merge([tmp_path / "one", tmp_path / "cut"], tmp_path / "unlike")
    assert tying(tmp_path / "unlike") is False
    found = updates(pair.target_model, tmp_path / "unlike")
    drift = table(pair.source_model) - table(pair.target_model)
    assert relative_error(found[TABLES["llama"]], 1.5 * drift) < CLOSE
    assert relative_error(found["lm_head"], drift) < CLOSE
