# SPDX-License-Identifier: Apache-2.0
"""Modules to tensors by rule: every rule, every error, and no guess in between."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_transfer.errors import MatchError
from lorax_transfer.matching import PREFIXES, match

MODULES = ["layers.0.attn.q_proj", "layers.0.mlp.down_proj", "layers.1.attn.q_proj"]


class Names:
    """A checkpoint of which only names and configuration matter."""

    location = "some/model"

    def __init__(self, names, config=None):
        self._names, self._config = list(names), config or {}

    def names(self):
        return self._names

    def config(self):
        return self._config


def weights(modules, prefix=""):
    return [f"{prefix}{module}.weight" for module in modules] + ["norm.weight", "norm.bias"]


@pytest.mark.parametrize(
    ("adapter", "checkpoint", "rule"),
    [
        ("", "", "exact"),
        ("model.", "model.", "exact"),
        ("", "model.", "prefix 'model.' added"),
        ("", "bert.", "prefix 'bert.' added"),
        ("transformer.", "", "prefix 'transformer.' removed"),
        ("model.", "language_model.model.", "prefix 'language_model.' added"),
        (
            "model.language_model.",
            "language_model.model.",
            "prefix 'model.language_model.' replaced by 'language_model.model.'",
        ),
        ("0.auto_model.", "bert.", "prefix '0.auto_model.' replaced by 'bert.'"),
    ],
)
def test_rules(adapter, checkpoint, rule):
    modules = [adapter + module for module in MODULES]
    found = match(modules, Names(weights(MODULES, checkpoint)), "target")
    assert found.rule == rule
    assert found.tensors == {adapter + module: f"{checkpoint}{module}.weight" for module in MODULES}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(added=st.sampled_from(["", *PREFIXES]), count=st.integers(1, 5), noise=st.booleans())
def test_a_prefix_of_the_list_is_always_found(added, count, noise):
    modules = [f"blocks.{i}.fc" for i in range(count)]
    names = weights(modules, added) + (["head.weight"] if noise else [])
    found = match(modules, Names(names), "target")
    assert found.tensors == {module: f"{added}{module}.weight" for module in modules}


def test_a_head_may_keep_its_name():
    modules = ["model.layers.0.q_proj", "lm_head"]
    names = Names(["model.language_model.layers.0.q_proj.weight", "lm_head.weight"])
    found = match(modules, names, "target")
    assert found.tensors["lm_head"] == "lm_head.weight"
    assert found.rule == "prefix 'model.' replaced by 'model.language_model.'"


@pytest.mark.parametrize("is_tied", [True, False], ids=["tied", "not-tied"])
def test_a_tied_head_is_the_embedding_only_if_the_config_says_so(is_tied):
    names = Names(
        ["model.embed_tokens.weight", "model.layers.0.q_proj.weight"],
        {"tie_word_embeddings": is_tied},
    )
    modules = ["model.layers.0.q_proj", "lm_head"]
    if is_tied:
        assert match(modules, names, "target").tensors["lm_head"] == "model.embed_tokens.weight"
    else:
        with pytest.raises(MatchError, match="no weight for 1 of the adapter's 2 modules: lm_head"):
            match(modules, names, "target")


def test_exact_names_win_over_prefixes():
    names = weights(MODULES) + weights(MODULES, "model.")
    assert match(MODULES, Names(names), "source").rule == "exact"


def test_two_rules_that_disagree_are_an_error():
    names = weights(MODULES, "encoder.") + weights(MODULES, "decoder.")
    with pytest.raises(MatchError) as caught:
        match(MODULES, Names(names), "source")
    for text in ("fits several", "encoder.layers.0", "decoder.layers.0", "some/model"):
        assert text in str(caught.value)


def test_a_rule_maps_all_or_none():
    # Each module is there under some prefix, but not all under one.
    names = [f"model.{MODULES[0]}.weight", f"bert.{MODULES[1]}.weight", f"{MODULES[2]}.weight"]
    with pytest.raises(MatchError, match="no weight for 2 of the adapter's 3 modules"):
        match(MODULES, Names(names), "target")


def test_missing_modules_are_named():
    modules = [f"layers.{i}.fc" for i in range(9)]
    with pytest.raises(MatchError) as caught:
        match(modules, Names(weights(modules[:2], "model.")), "target")
    text = str(caught.value)
    assert "layers.2.fc, layers.3.fc, layers.4.fc, layers.5.fc, layers.6.fc and 2 more" in text
    assert "prefix 'model.' added" in text
    assert "--exclude" in text


def test_no_match_shows_both_sides():
    with pytest.raises(MatchError) as caught:
        match(MODULES, Names(["h.0.attn.c_attn.weight", "wte.weight"]), "source")
    text = str(caught.value)
    assert "layers.0.attn.q_proj" in text
    assert "h.0.attn.c_attn.weight" in text or "wte.weight" in text


def test_an_empty_checkpoint_is_no_crash():
    with pytest.raises(MatchError, match="no module of the adapter"):
        match(MODULES, Names([]), "source")
