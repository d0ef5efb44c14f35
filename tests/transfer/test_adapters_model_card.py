# SPDX-License-Identifier: Apache-2.0
"""The model card: metadata that a YAML parser reads back, Markdown that says what was done."""

import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_transfer.adapters.model_card import model_card

FACTS = {
    "base_model": "org/target",
    "source_model": "org/source",
    "adapter": "org/adapter",
    "method": "lorax",
    "rank": 320,
    "version": "0.1.0",
}


def front_matter(card: str) -> dict:
    _, header, _ = card.split("---\n", 2)
    return yaml.safe_load(header)


def test_metadata_that_hubs_read():
    data = ModelCard(model_card(**FACTS, tags=["text-generation"])).data.to_dict()
    assert data["base_model"] == "org/target"
    assert data["library_name"] == "peft"
    assert data["tags"] == ["lora", "base_model:adapter:org/target", "text-generation"]


def test_everything_said_is_in_the_card():
    card = model_card(
        **FACTS,
        command="lorax-transfer transfer a --source b",
        totals={"Layers": 36, "Energy kept": 0.512345, "Worst | best": "0.1 | 0.9"},
        dropped=["model.fc.lora_magnitude_vector"],
        dropped_kinds=["dora"],
    )
    for text in (
        "| Method | lorax |",
        "| Rank | 320 |",
        "| Made with | lorax-transfer 0.1.0 |",
        "lorax-transfer transfer a --source b",
        "| Layers | 36 |",
        "| Energy kept | 0.5123 |",
        r"| Worst \| best | 0.1 \| 0.9 |",
        "were not carried (dora)",
        "- `model.fc.lora_magnitude_vector`",
    ):
        assert text in card
    assert card.endswith("```\n")


def test_what_is_not_known_is_left_out():
    card = model_card(**{**FACTS, "rank": None})
    for text in ("Rank", "None", "Left out", "Result", "```shell"):
        assert text not in card


@settings(max_examples=300, deadline=None)
@given(name=st.text(st.characters(exclude_categories=["Cs"]), max_size=30))
def test_any_name_survives_the_yaml(name):
    data = front_matter(model_card(**{**FACTS, "base_model": name}))
    assert data["base_model"] == name
    assert data["tags"][1] == f"base_model:adapter:{name}"


@pytest.mark.parametrize(
    "name", ["a: b #c", "- x", "yes", "1.0", 'C:\\m "x"', "a\nb: c", "\x7f\x85\u2028", "😀"]
)
def test_names_that_yaml_would_misread(name):
    assert front_matter(model_card(**{**FACTS, "base_model": name}))["base_model"] == name


def test_backticks_do_not_end_code():
    card = model_card(**{**FACTS, "adapter": "a`b"}, command="echo ```")
    assert "`` a`b ``" in card
    assert "````shell\necho ```\n````" in card
