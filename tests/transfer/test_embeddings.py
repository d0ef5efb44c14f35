# SPDX-License-Identifier: Apache-2.0
"""Embeddings that are given back: what stock PEFT makes of the files, tied or not."""

import copy
import json
import warnings

import peft
import pytest
import torch
from adapter_makers import llama, load_adapter
from pairs import LANGUAGE, language_pair, make_pair, perturb
from safetensors.torch import load_file, save_file

import lorax_transfer
from lorax_transfer.errors import MatchError, TransferError

VOCABULARY, WIDTH = 64, 32

IDS = torch.arange(8)[None]


def loaded(model, adapter):
    return load_adapter(copy.deepcopy(model), adapter)


def restored(pair, share):
    """The target with a share of its embeddings' drift undone, on both sides."""
    model = copy.deepcopy(pair.target_model)
    with torch.no_grad():
        for get in ("get_input_embeddings", "get_output_embeddings"):
            old, new = (getattr(m, get)().weight for m in (pair.source_model, pair.target_model))
            getattr(model, get)().weight.copy_(new + share * (old - new))
    return model


@torch.no_grad()
@pytest.mark.parametrize("share", [1.0, 0.5], ids=lambda share: f"share={share}")
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", list(LANGUAGE))
def test_stock_peft_computes_with_the_embeddings_given_back(tmp_path, name, tied, share):
    pair = language_pair(tmp_path, name, tied)
    report = lorax_transfer.transfer(
        pair.adapter,
        pair.source,
        pair.target,
        tmp_path / "moved",
        method="copy",
        embeddings=share,
        # All of them, so that the result is known exactly.
        directions=WIDTH,
        device="cpu",
    )
    expected = loaded(restored(pair, share), pair.adapter)(IDS).logits
    found = loaded(pair.target_model, tmp_path / "moved")(IDS).logits
    # float32 through two layers, and factors of float32 Gram matrices.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    plain = loaded(pair.target_model, pair.adapter)(IDS).logits
    assert (found - plain).norm() > 0.05 * plain.norm()
    assert [x.is_output for x in report.embeddings] == [False, True]
    for each in report.embeddings:
        # make_pair moves every parameter by 20 %.
        assert each.drift == pytest.approx(0.2, rel=1e-3)
        assert each.drift_undone == pytest.approx(share, rel=1e-3)
        assert each.rank == WIDTH
    assert report.totals.embedding_drift == pytest.approx(0.2, rel=1e-3)
    assert report.totals.untouched_drift == pytest.approx(0.2, rel=1e-3)


@torch.no_grad()
def test_peft_merges_them_where_they_are_not_tied(tmp_path):
    pair = language_pair(tmp_path, "llama", False)
    moved = tmp_path / "moved"
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, moved, method="copy", embeddings=1.0
    )
    assert not any("merging" in text for text in report.warnings)
    model = loaded(pair.target_model, moved)
    before = model(IDS).logits
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, before, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_peft_merges_tied_ones_after_they_were_untied(tmp_path):
    """What docs/methods.md advises, and that PEFT adds tied updates twice without it."""
    pair = language_pair(tmp_path, "llama", True)
    moved = tmp_path / "moved"
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, moved, method="copy", embeddings=1.0
    )
    assert any("merging would add the updates of both" in text for text in report.warnings)
    assert "To merge it" in (moved / "README.md").read_text()
    expected = loaded(pair.target_model, moved)(IDS).logits
    tied = loaded(pair.target_model, moved)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = tied.merge_and_unload()
    assert (merged(IDS).logits - expected).norm() > 0.01 * expected.norm()
    untied = llama(False)
    untied.load_state_dict(pair.target_model.state_dict())
    model = peft.PeftModel.from_pretrained(untied, moved).eval()
    torch.testing.assert_close(model.merge_and_unload()(IDS).logits, expected, rtol=1e-4, atol=1e-4)


def test_few_directions_make_a_small_file(tmp_path):
    pair = language_pair(tmp_path, "llama", True)
    moved = tmp_path / "moved"
    report = lorax_transfer.transfer(
        pair.adapter,
        pair.source,
        pair.target,
        moved,
        method="restore",
        directions=3,
        embeddings=1.0,
    )
    tensors = load_file(moved / "adapter_model.safetensors")
    prefix = "base_model.model"
    shapes = {name: tuple(x.shape) for name, x in tensors.items()}
    assert shapes[f"{prefix}.model.embed_tokens.lora_embedding_A"] == (3, VOCABULARY)
    assert shapes[f"{prefix}.model.embed_tokens.lora_embedding_B"] == (WIDTH, 3)
    assert shapes[f"{prefix}.lm_head.lora_A.weight"] == (3, WIDTH)
    assert shapes[f"{prefix}.lm_head.lora_B.weight"] == (VOCABULARY, 3)
    config = json.loads((moved / "adapter_config.json").read_text())
    assert config["ensure_weight_tying"] is True
    source, target = (
        m.get_input_embeddings().weight.detach() for m in (pair.source_model, pair.target_model)
    )
    energies = torch.linalg.svdvals((target - source).double()).square()
    expected = float(energies[:3].sum() / energies.sum())
    assert report.embeddings[0].drift_undone == pytest.approx(expected, rel=1e-4)
    # The layers' own part is what it is without.
    alone = tmp_path / "alone"
    lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, alone, method="restore", directions=3
    )
    for name, tensor in load_file(alone / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=0)
    assert json.loads((alone / "adapter_config.json").read_text()).get("ensure_weight_tying") in (
        None,
        False,
    )


@torch.no_grad()
def test_layers_are_restored_by_half_where_embeddings_are_given_back(tmp_path):
    """By half, not in full: what that would win costs the target more (docs/quality.md)."""
    target = llama(True)
    # As language models do: the embeddings by more than twice as much as the layers.
    perturb(target, 0.02)
    target.get_input_embeddings().weight.mul_(1.1)
    pair = make_pair(
        tmp_path, lambda: llama(True), target=target, target_modules=LANGUAGE["llama"][1]
    )
    shares = {}
    for embeddings in (0.0, 0.5, 1.0):
        report = lorax_transfer.transfer(
            pair.adapter,
            pair.source,
            pair.target,
            tmp_path / f"moved-{embeddings}",
            method="restore",
            directions=WIDTH,
            embeddings=embeddings,
        )
        shares[embeddings] = [x.outcomes["restore"].drift_undone for x in report.layers]
    # 0.4 % of 2 %.
    assert shares[0.0] == pytest.approx([0.2] * len(shares[0.0]), rel=1e-3)
    for embeddings in (0.5, 1.0):
        assert shares[embeddings] == pytest.approx([0.5] * len(shares[0.0]), rel=1e-3)


@pytest.mark.parametrize("case", ["vocabulary", "none", "aligned", "cores", "share"])
def test_what_cannot_be_given_back_is_refused(tmp_path, case):
    pair = language_pair(tmp_path, "llama", True)
    options, error, message = {"method": "copy", "embeddings": 1.0}, MatchError, ""
    if case == "vocabulary":
        model = copy.deepcopy(pair.target_model)
        model.resize_token_embeddings(VOCABULARY + 3, mean_resizing=False)
        model.save_pretrained(pair.target)
        message = "leave --embeddings out"
    elif case == "none":
        for place in (pair.source, pair.target):
            tensors = load_file(place / "model.safetensors")
            tensors.pop("model.embed_tokens.weight")
            save_file(tensors, place / "model.safetensors", metadata={"format": "pt"})
        message = "has no embeddings"
    else:
        error = TransferError
        options |= {"aligned": {"method": "aligned"}, "cores": {"form": "lorax"}}.get(
            case, {"embeddings": 1.5}
        )
        message = {"aligned": "method aligned", "cores": "no core"}.get(case, "share in")
    with pytest.raises(error, match=message):
        lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "moved", **options
        )
    assert not (tmp_path / "moved").exists()


@pytest.mark.parametrize("says", [None, False], ids=["not said", "denied"])
def test_a_missing_output_layer_is_tied_unless_that_is_denied(tmp_path, says):
    """A lone file of a tied model has no configuration, and that of older ones is mute."""
    pair = language_pair(tmp_path, "llama", True)
    for place in (pair.source, pair.target):
        config = json.loads((place / "config.json").read_text())
        config.pop("tie_word_embeddings")
        if says is not None:
            config["tie_word_embeddings"] = says
        (place / "config.json").write_text(json.dumps(config))
    found = lorax_transfer.scan(pair.adapter, pair.source, pair.target).embeddings
    expected = ["model.embed_tokens", "lm_head"] if says is None else ["model.embed_tokens"]
    assert [x.module for x in found] == expected
    if says is None:
        files = [place / "model.safetensors" for place in (pair.source, pair.target)]
        alone = lorax_transfer.scan(pair.adapter, *files).embeddings
        assert [x.module for x in alone] == expected


def test_names_with_another_start_are_found(tmp_path):
    """A text model inside of a larger one, as the target; its adapter is the text model's."""
    pair = language_pair(tmp_path, "llama", True)
    tensors = load_file(pair.target / "model.safetensors")
    renamed = {f"language_model.{name}": x for name, x in tensors.items()}
    save_file(renamed, pair.target / "model.safetensors", metadata={"format": "pt"})
    report = lorax_transfer.scan(pair.adapter, pair.source, pair.target)
    assert [(x.module, x.target_tensor) for x in report.embeddings] == [
        ("model.embed_tokens", "language_model.model.embed_tokens.weight"),
        ("lm_head", "language_model.model.embed_tokens.weight"),
    ]
    assert report.totals.embedding_drift == pytest.approx(0.2, rel=1e-3)
    assert report.totals.untouched_drift == pytest.approx(0.2, rel=1e-3)
