# SPDX-License-Identifier: Apache-2.0
"""Tensor names: every spelling of a module leads to the path that PEFT uses."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_transfer.adapters.peft_names import PREFIX, parse_name, strip_prefixes

# Words that also appear in the grammar itself are the ones a careless parser trips over.
COMPONENT = st.sampled_from(
    ["model", "layers", "0", "11", "q_proj", "lora", "weight", "default", "encoder", "module"]
) | st.from_regex(r"[a-z][a-z0-9_]{0,5}", fullmatch=True).filter(
    lambda word: not word.startswith("lora_")
)
MODULE = st.lists(COMPONENT, min_size=1, max_size=5).map(".".join)
# A path that begins like a wrapper cannot be told from one.
PLAIN_MODULE = MODULE.filter(lambda m: not m.startswith(("module.", PREFIX)) and m != "module")
START = st.lists(st.sampled_from([PREFIX, "_orig_mod.", "module."]), max_size=4).map("".join)
INFIX = st.sampled_from(["", ".default", ".my-adapter", ".weight2"])


@settings(max_examples=200, deadline=None)
@given(modules=st.lists(PLAIN_MODULE, min_size=1, max_size=4), start=START, infix=INFIX)
def test_any_prefix_and_infix_give_the_module(modules, start, infix):
    names = [f"{start}{module}.lora_A{infix}.weight" for module in modules]
    short = strip_prefixes(names)
    for module, name in zip(modules, names, strict=True):
        parsed = parse_name(short[name], {})
        assert (parsed.role, parsed.module) == ("lora_A", module)
        assert parsed.adapter == (infix.removeprefix(".") or None)


@settings(max_examples=50, deadline=None)
@given(module=PLAIN_MODULE, data=st.data())
def test_wrappers_inside_the_path_are_taken_out(module, data):
    parts = module.split(".")
    at = data.draw(st.integers(0, len(parts)))
    wrapper = data.draw(st.sampled_from(["_orig_mod", "_fsdp_wrapped_module"]))
    wrapped = ".".join([*parts[:at], wrapper, *parts[at:]])
    name = f"{PREFIX}{wrapped}.lora_B.weight"
    assert parse_name(strip_prefixes([name])[name], {}).module == module


def test_a_module_called_module_is_kept_where_it_is_not_a_wrapper():
    names = ["module.fc.lora_A.weight", "head.lora_A.weight"]
    assert list(strip_prefixes(names).values()) == names


def test_no_names():
    assert strip_prefixes([]) == {}


@pytest.mark.parametrize(
    ("name", "config", "role", "module"),
    [
        ("fc.lora_magnitude_vector", {}, "dora", "fc"),
        ("fc.lora_magnitude_vector.default.weight", {}, "dora", "fc"),
        ("wte.lora_embedding_A", {}, "lora_embedding_A", "wte"),
        ("wte.lora_embedding_B.default", {}, "lora_embedding_B", "wte"),
        ("fc.lora_B.bias", {}, "bias", "fc"),
        ("fc.lora_B.default.bias", {}, "bias", "fc"),
        ("fc.base_layer.bias", {}, "bias", "fc"),
        ("ln.bias", {"bias": "all"}, "bias", "ln"),
        ("ln.bias", {"bias": "none"}, "unknown", "ln.bias"),
        ("m.embed_tokens.token_adapter.trainable_tokens_delta", {}, "trainable_tokens", None),
        ("m.score.weight", {"modules_to_save": ["score"]}, "modules_to_save", "m.score"),
        ("m.score.weight", {}, "unknown", "m.score.weight"),
        ("m.scores.weight", {"modules_to_save": ["score"]}, "unknown", "m.scores.weight"),
        ("score.0.bias", {"modules_to_save": ["score"]}, "modules_to_save", "score.0"),
        ("score.modules_to_save.default.weight", {}, "modules_to_save", "score"),
        ("m.embed_tokens.weight", {}, "modules_to_save", "m.embed_tokens"),
        ("lm_head.base_layer.weight", {}, "modules_to_save", "lm_head"),
        ("m.experts.base_layer.lora_A.weight", {}, "experts", "m.experts"),
        ("m.experts.lora_A.weight", {"target_parameters": ["experts.up"]}, "experts", "m.experts"),
        ("m.fc.lora_A.weight", {"target_parameters": ["experts.up"]}, "lora_A", "m.fc"),
        ("m.fc.lora_A.weight", {"target_parameters": ["up"]}, "experts", "m.fc"),
        (
            "m.fc.lora_A.weight",
            {"target_parameters": ["up"], "target_modules": ["fc"]},
            "lora_A",
            "m.fc",
        ),
        ("fc.lora_E", {}, "unknown", "fc.lora_E"),
        ("fc.lora_diag", {}, "unknown", "fc.lora_diag"),
        ("lora_A.weight", {}, "unknown", "lora_A.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_roles(name, config, role, module):
    parsed = parse_name(name, config)
    assert parsed.role == role
    assert parsed.module == (module or "m.embed_tokens")
