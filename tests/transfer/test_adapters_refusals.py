# SPDX-License-Identifier: Apache-2.0
"""What is broken or cannot be carried is refused by name, in one message, or dropped on request."""

import json
import pickle
import re
import zipfile

import pytest
import torch
from adapter_makers import (
    convnet,
    llama,
    load_adapter,
    mixtral,
    plain_config,
    plain_tensors,
    save_adapter,
    write_files,
)

from lorax_transfer.adapters import DROPPABLE, read_adapter, write_adapter
from lorax_transfer.errors import AdapterError

pytestmark = [
    # The tiny models have no biases to train.
    pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed but the targeted layer"),
    # peft takes the one-dimensional lora_B.bias for a factor that was not gathered.
    pytest.mark.filterwarnings("ignore:.*LoRA tensor.s. have invalid shape"),
]

STEM = "base_model.model."
FC_A, FC_B = f"{STEM}h.0.fc.lora_A.weight", f"{STEM}h.0.fc.lora_B.weight"

# For each kind: how the real peft comes to write it, and a tensor or setting that shows it.
PEFT_CASES = {
    "dora": (llama, {"use_dora": True}, "use_dora=True"),
    "modules_to_save": (llama, {"modules_to_save": ["lm_head"]}, "modules_to_save=['lm_head']"),
    "modules_to_save-embedding": (
        llama,
        {"target_modules": ["q_proj", "embed_tokens"]},
        "embed_tokens.base_layer.weight",
    ),
    "bias": (convnet, {"bias": "all", "target_modules": ["head"]}, "conv.bias and 1 more"),
    "bias-lora_only": (convnet, {"bias": "lora_only", "target_modules": ["head"]}, "base_layer"),
    "bias-lora_bias": (llama, {"lora_bias": True}, "q_proj.lora_B.bias"),
    "experts": (
        mixtral,
        {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
        "target_parameters",
    ),
    "trainable_tokens": (llama, {"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    "mutated_init": (llama, {"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "mutated_init-pissa": (llama, {"init_lora_weights": "pissa_niter_2"}, "pissa_niter_2"),
}


@pytest.mark.parametrize(("name", "case"), PEFT_CASES.items(), ids=PEFT_CASES)
def test_kinds_that_peft_writes_are_refused_or_dropped(tmp_path, name, case):
    make, config, shown = case
    save_adapter(make(), tmp_path / "in", **{"r": 4, "target_modules": ["q_proj"], **config})
    kind = name.partition("-")[0]
    with pytest.raises(AdapterError, match=re.escape(shown)) as refusal:
        read_adapter(tmp_path / "in")
    assert f"--drop {kind}" in str(refusal.value)
    assert DROPPABLE[kind].advice in str(refusal.value)

    adapter = read_adapter(tmp_path / "in", drop={kind})
    assert set(adapter.dropped_kinds) == {kind}
    assert bool(adapter.dropped) == (kind != "mutated_init")
    assert set(adapter.layers).isdisjoint(adapter.dropped)

    options = {"base_model_name_or_path": "t", "provenance": {}, "model_card": ""}
    write_adapter(adapter, tmp_path / "out", **options)
    loaded = load_adapter(make(), tmp_path / "out")
    assert set(loaded.targeted_module_names) == set(adapter.layers)
    # What was written has nothing left to refuse.
    again = read_adapter(tmp_path / "out")
    assert again.dropped_kinds == ()
    for module, layer in adapter.layers.items():
        assert torch.equal(again.layers[module].lora_A, layer.lora_A)
        assert torch.equal(again.layers[module].lora_B, layer.lora_B)
        assert again.layers[module].scale == layer.scale


def test_all_kinds_are_named_in_one_error(tmp_path):
    tensors = plain_tensors(
        **{
            f"{STEM}wte.lora_embedding_A": torch.ones(4, 9),
            f"{STEM}wte.lora_embedding_B": torch.ones(8, 4),
            f"{STEM}wte.base_layer.weight": torch.ones(9, 8),
            f"{STEM}lm_head.base_layer.weight": torch.ones(9, 8),
            f"{STEM}h.0.fc.lora_B.bias": torch.ones(8),
        }
    )
    write_files(tmp_path, plain_config(use_dora=True), tensors)
    with pytest.raises(AdapterError) as refusal:
        read_adapter(tmp_path)
    assert "--drop dora --drop modules_to_save --drop bias" in str(refusal.value)
    assert "base_layer.weight and 1 more" in str(refusal.value)
    # A transfer can carry it.
    assert "--drop embedding" not in str(refusal.value)
    with pytest.raises(AdapterError, match="--drop modules_to_save") as refusal:
        read_adapter(tmp_path, drop={"dora", "embedding", "bias"})
    assert "--drop dora" not in str(refusal.value)


def test_dropping_what_is_not_there_is_no_error(tmp_path):
    adapter = read_adapter(write_files(tmp_path, plain_config(), plain_tensors()), drop=DROPPABLE)
    assert adapter.dropped == ()
    assert adapter.dropped_kinds == ()


def test_unknown_kind_is_named(tmp_path):
    write_files(tmp_path, plain_config(), plain_tensors())
    with pytest.raises(AdapterError, match=r"cannot drop 'dorra': expected any of dora, "):
        read_adapter(tmp_path, drop=["dorra"])


def test_biases_that_were_never_written_are_not_refused(tmp_path):
    adapter = read_adapter(write_files(tmp_path, plain_config(bias="all"), plain_tensors()))
    assert adapter.dropped == ()


def test_nothing_left_after_dropping(tmp_path):
    tensors = {f"{STEM}wte.lora_embedding_{x}": torch.ones(4, 4) for x in "AB"}
    write_files(tmp_path, plain_config(), tensors)
    with pytest.raises(AdapterError, match="no lora_A and lora_B tensors after leaving out embed"):
        read_adapter(tmp_path, drop=["embedding"])


CONFIGS = {
    "no-r": ({"r": None}, "r = None, expected a number"),
    "r-as-text": ({"r": "4"}, "r = '4', expected a number"),
    "no-alpha": ({"lora_alpha": None}, "lora_alpha = None, expected a number"),
    "loha": ({"peft_type": "LOHA"}, "peft_type 'LOHA', expected 'LORA'"),
    "adalora": ({"peft_type": "ADALORA"}, "peft_type 'ADALORA', expected 'LORA'"),
    "no-type": ({"peft_type": None}, "peft_type None, expected 'LORA'"),
    "other-r": ({"r": 8}, "says rank 8 for h.0.fc but its tensors have rank 4"),
    "other-r-by-pattern": (
        {"rank_pattern": {"proj": 2}},
        "says rank 2 for h.0.proj but its tensors have rank 4",
    ),
    "bad-pattern": ({"rank_pattern": {"(": 2}}, "has the key '(', which is no regular expression"),
    "bad-pattern-value": ({"alpha_pattern": {"fc": "8"}}, "expected an object of numbers"),
    "infinite-alpha": ({"lora_alpha": float("inf")}, "the scale of h.0.fc is inf"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens and cannot be carried"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication and cannot be carried"),
    "qalora": ({"use_qalora": True}, "use_qalora and cannot be carried"),
    "bdlora": ({"use_bdlora": {"nblocks": 2}}, "use_bdlora and cannot be carried"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config and cannot be carried"),
    "kasa": ({"kasa_config": {"beta": 1}}, "kasa_config and cannot be carried"),
    "megatron": ({"megatron_config": {"x": 1}}, "megatron_config and cannot be carried"),
    "enable_lora": ({"enable_lora": [True, False]}, "enable_lora and cannot be carried"),
    "future": ({"use_warp": True}, "use_warp and cannot be carried: nothing is known"),
    "loftq": ({"init_lora_weights": "loftq"}, "--drop mutated_init"),
    "corda": ({"init_lora_weights": "corda"}, "--drop mutated_init"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "--drop mutated_init"),
    "future-init": ({"init_lora_weights": "warp"}, "init_lora_weights='warp'"),
}


@pytest.mark.parametrize(("changes", "message"), CONFIGS.values(), ids=CONFIGS)
def test_bad_configuration(tmp_path, changes, message):
    config = {**plain_config(), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    write_files(tmp_path, config, plain_tensors())
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(tmp_path)


HARMLESS = {
    "gaussian": {"init_lora_weights": "gaussian"},
    "init-false": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "switches-off": {"use_qalora": False, "enable_lora": None, "arrow_config": None, "use_x": None},
    "velora": {"velora_config": {"scale": 1.0}},
    "note": {"trained_by": "someone"},
}


@pytest.mark.parametrize("changes", HARMLESS.values(), ids=HARMLESS)
def test_harmless_configuration(tmp_path, changes):
    write_files(tmp_path, {**plain_config(), **changes}, plain_tensors())
    assert list(read_adapter(tmp_path).layers) == ["h.0.fc", "h.0.proj"]


def changed(**changes):
    tensors = plain_tensors()
    for name, value in changes.items():
        key = {"A": FC_A, "B": FC_B}.get(name, name)
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    return tensors


def with_value(value):
    tensor = torch.ones(4, 16)
    tensor[2, 3] = value
    return tensor


TENSORS = {
    "A-without-B": (changed(B=None), "holds lora_A of h.0.fc but not lora_B"),
    "B-without-A": (changed(A=None), "holds lora_B of h.0.fc but not lora_A"),
    "table-without-B": (
        changed(**{f"{STEM}wte.lora_embedding_A": torch.ones(4, 9)}),
        "holds lora_embedding_A of wte but not lora_embedding_B",
    ),
    "layer-and-table": (
        changed(**{f"{STEM}h.0.fc.lora_embedding_{x}": torch.ones(4, 4) for x in "AB"}),
        "holds lora_A, lora_B, lora_embedding_A, lora_embedding_B of h.0.fc, expected",
    ),
    "table-of-another-rank": (
        changed(
            **{f"{STEM}wte.lora_embedding_{x}": torch.ones(4, r) for x, r in (("A", 9), ("B", 3))}
        ),
        "the factors of wte do not chain",
    ),
    "table-not-gathered": (
        changed(**{f"{STEM}wte.lora_embedding_{x}": torch.ones(36) for x in "AB"}),
        "has shape (36,), expected two or more",
    ),
    "no-chain": (changed(B=torch.ones(8, 3)), "the factors of h.0.fc do not chain"),
    "transposed": (changed(B=torch.ones(4, 8)), "lora_A has shape (4, 16) and lora_B (4, 8)"),
    "grouped-conv": (changed(B=torch.ones(8, 2, 1)), "the factors of h.0.fc do not chain"),
    "wide-conv-B": (
        changed(A=torch.ones(4, 3, 3, 3), B=torch.ones(8, 4, 3, 3)),
        "expected lora_B (out, r, 1, 1) with r = 4",
    ),
    "integer": (changed(A=torch.ones(4, 16, dtype=torch.int8)), "lora_A is torch.int8"),
    "fp8": (changed(A=torch.ones(4, 16).to(torch.float8_e4m3fn)), "is torch.float8_e4m3fn"),
    "not-gathered": (changed(A=torch.ones(64)), "has shape (64,), expected two or more"),
    "empty": (changed(A=torch.ones(4, 0)), "has shape (4, 0), expected two or more"),
    "nan": (changed(A=with_value(float("nan"))), f"{FC_A} of"),
    "inf": (changed(A=with_value(float("inf"))), "holds NaN or Inf"),
    "unknown": (
        changed(**{f"{STEM}h.0.fc.magic": torch.ones(2)}),
        "the tensor base_model.model.h.",
    ),
    "two-adapters": (
        changed(**{f"{STEM}h.1.fc.lora_A.other.weight": torch.ones(4, 16)}),
        "holds two adapters in one file",
    ),
    "twice": (changed(**{"h.0.fc.lora_A.weight": torch.ones(4, 16)}), "lora_A of h.0.fc twice"),
    "nothing": ({}, "holds no lora_A and lora_B tensors at all"),
}


@pytest.mark.parametrize(("tensors", "message"), TENSORS.values(), ids=TENSORS)
def test_bad_tensors(tmp_path, tensors, message):
    write_files(tmp_path, plain_config(), tensors)
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(tmp_path)


def remove(name):
    return lambda path: (path / name).unlink()


def overwrite(name, data):
    return lambda path: (path / name).write_bytes(data)


def truncate(size):
    def apply(path):
        file = path / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:size])

    return apply


def only_pickle(path):
    (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")


def zipped(path):
    with zipfile.ZipFile(path / "adapter_model.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"")


FILES = {
    "no-config": (remove("adapter_config.json"), "has no adapter_config.json"),
    "no-tensors": (remove("adapter_model.safetensors"), "has no adapter_model.safetensors"),
    "only-pickle": (only_pickle, "only a pickle, adapter_model.bin, which is not opened"),
    "disguised-zip": (zipped, "is a pickle in spite of its name"),
    "disguised-pickle": (
        overwrite("adapter_model.safetensors", pickle.dumps({"a": 1})),
        "is a pickle in spite of its name",
    ),
    "truncated-header": (truncate(20), "is not a complete safetensors file"),
    "truncated-data": (truncate(-1), "is not a complete safetensors file"),
    "empty-file": (truncate(0), "is not a complete safetensors file"),
    "not-json": (overwrite("adapter_config.json", b"{r: 4"), "cannot be read as JSON"),
    "not-text": (overwrite("adapter_config.json", b"\xff\xfe"), "cannot be read as JSON"),
    "not-an-object": (overwrite("adapter_config.json", b"[]"), "holds a list, expected a JSON obj"),
}


@pytest.mark.parametrize(("damage", "message"), FILES.values(), ids=FILES)
def test_bad_files(tmp_path, damage, message):
    write_files(tmp_path, plain_config(), plain_tensors())
    damage(tmp_path)
    with pytest.raises(AdapterError, match=re.escape(message)):
        read_adapter(tmp_path)


def test_bad_places(tmp_path):
    with pytest.raises(AdapterError, match="does not exist"):
        read_adapter(tmp_path / "nowhere")
    write_files(tmp_path / "run" / "style", plain_config(), plain_tensors())
    with pytest.raises(AdapterError, match="is a file, expected the directory"):
        read_adapter(tmp_path / "run" / "style" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="pass one of its subdirectories style"):
        read_adapter(tmp_path / "run")
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapter(tmp_path)


def test_a_header_that_starts_like_a_pickle_is_read(tmp_path):
    # A header of 640 bytes begins 80 02, as pickles of protocol 2 do.
    write_files(tmp_path, plain_config(), plain_tensors())
    file = tmp_path / "adapter_model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    padded = data[8 : 8 + size].ljust(640)
    assert len(padded) == 640
    file.write_bytes((640).to_bytes(8, "little") + padded + data[8 + size :])
    assert file.read_bytes().startswith(b"\x80\x02")
    assert len(read_adapter(tmp_path).layers) == 2


def test_errors_name_the_adapter_and_are_one_sentence(tmp_path):
    write_files(tmp_path, plain_config(r=8), plain_tensors())
    with pytest.raises(AdapterError) as refusal:
        read_adapter(tmp_path)
    message = str(refusal.value)
    assert message.startswith(str(tmp_path))
    assert message.endswith(".")
    assert "\n" not in message


def test_each_expert_as_its_own_module_is_an_ordinary_layer(tmp_path):
    tensors = {
        f"{STEM}experts.{n}.w1.lora_{x}.weight": torch.ones(4, 4) for n in range(2) for x in "AB"
    }
    adapter = read_adapter(write_files(tmp_path, plain_config(target_modules=["w1"]), tensors))
    assert list(adapter.layers) == ["experts.0.w1", "experts.1.w1"]


def test_the_config_is_returned_as_read(tmp_path):
    config = plain_config(fan_in_fan_out=True, target_modules="all-linear")
    adapter = read_adapter(write_files(tmp_path, config, plain_tensors()))
    assert adapter.config == json.loads((tmp_path / "adapter_config.json").read_text()) == config
    assert adapter.fan_in_fan_out
    assert adapter.location == tmp_path
    assert adapter.targets == ("h.0.fc", "h.0.proj")
