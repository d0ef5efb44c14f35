# SPDX-License-Identifier: Apache-2.0
"""Round trips through stock PEFT: what is read and written computes the same logits."""

import json

import peft
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
from safetensors import safe_open
from safetensors.torch import load_file

from lorax_transfer.adapters import Adapter, LoraLayer, read_adapter, write_adapter
from lorax_transfer.errors import AdapterError, OutputError

ATTENTION = ["q_proj", "v_proj"]
CASES = {
    "llama": (llama, {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "llama-regex": (llama, {"r": 4, "target_modules": r".*\.(q_proj|down_proj)"}),
    "llama-all-linear": (llama, {"r": 2, "target_modules": "all-linear"}),
    "llama-rslora": (
        llama,
        {"r": 6, "lora_alpha": 5, "use_rslora": True, "target_modules": ATTENTION},
    ),
    "llama-patterns": (
        llama,
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": [*ATTENTION, "up_proj"],
            "rank_pattern": {r"layers\.1\..*": 3, "q_proj": 5},
            "alpha_pattern": {"^model.layers.0.self_attn.q_proj": 7, "up_proj": 1},
        },
    ),
    "llama-patterns-rslora": (
        llama,
        {
            "r": 4,
            "target_modules": ATTENTION,
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "llama-lm-head": (llama, {"r": 4, "target_modules": ["q_proj", "lm_head"]}),
    "gpt2": (gpt2, {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "conv": (convnet, {"r": 2, "lora_alpha": 3, "target_modules": ["conv", "head"]}),
}


def inputs(make):
    generator = torch.Generator().manual_seed(2)
    if make is convnet:
        return (torch.randn(2, 3, 6, 6, generator=generator),)
    return (torch.randint(0, 64, (2, 7), generator=generator),)


@torch.no_grad()
def outputs(model, make):
    out = model(*inputs(make))
    return out if isinstance(out, torch.Tensor) else out.logits


def write(adapter, path, **options):
    defaults = {"base_model_name_or_path": "org/target", "provenance": {}, "model_card": "# Card\n"}
    return write_adapter(adapter, path, **{**defaults, **options})


@pytest.mark.parametrize(("make", "config"), CASES.values(), ids=CASES)
def test_round_trip_gives_equal_logits(tmp_path, make, config):
    expected = outputs(save_adapter(make(), tmp_path / "in", **config), make)
    adapter = read_adapter(tmp_path / "in", drop=["modules_to_save"])
    write(adapter, tmp_path / "out")
    actual = outputs(load_adapter(make(), tmp_path / "out"), make)
    # The same tensors go through the same operations, so not one bit may differ.
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, outputs(make(), make))


@pytest.mark.parametrize(("make", "config"), CASES.values(), ids=CASES)
def test_modules_and_scales_are_what_peft_uses(tmp_path, make, config):
    model = save_adapter(make(), tmp_path, **config)
    layers = read_adapter(tmp_path, drop=["modules_to_save"]).layers
    tuned = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert set(layers) == set(tuned)
    for name, module in tuned.items():
        layer = layers[name]
        assert layer.scale == module.scaling["default"]
        delta = layer.scale * layer.matrix_B @ layer.matrix_A
        reference = module.get_delta_weight("default").detach()
        if make is gpt2:
            reference = reference.T
        # One fp32 product, its scale applied before or after: a few units of 6e-8.
        torch.testing.assert_close(delta, reference.flatten(1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["alpha/r", "alpha/sqrt-r"])
def test_changed_ranks_and_scales_reach_peft(tmp_path, use_rslora):
    config = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "use_rslora": use_rslora}
    save_adapter(llama(), tmp_path / "in", **config, alpha_pattern={"v_proj": 2})
    adapter = read_adapter(tmp_path / "in")
    generator = torch.Generator().manual_seed(3)
    scales = [1.0, 2 / 3, 0.1, 1.0]
    changed = [
        layer.with_factors(
            torch.randn(layer.out_features, rank, generator=generator),
            torch.randn(rank, layer.in_features, generator=generator),
            scale,
        )
        for layer, rank, scale in zip(adapter.layers.values(), [4, 7, 3, 7], scales, strict=True)
    ]
    write(adapter.with_layers(changed), tmp_path / "out")
    model = load_adapter(llama(), tmp_path / "out").get_base_model()
    for layer in changed:
        module = model.get_submodule(layer.module)
        assert module.r["default"] == layer.rank
        # A quotient of doubles can miss a double by one unit in the last place.
        assert module.scaling["default"] == pytest.approx(layer.scale, rel=2.3e-16, abs=0)
        assert torch.equal(module.lora_A["default"].weight, layer.lora_A)
        assert torch.equal(module.lora_B["default"].weight, layer.lora_B)


def test_equal_new_ranks_need_no_patterns(tmp_path):
    tensors = plain_tensors()
    config = plain_config(rank_pattern={"fc": 4}, alpha_pattern={"proj": 2}, lora_dropout=0.1)
    adapter = read_adapter(write_files(tmp_path / "in", config, tensors))
    changed = [
        layer.with_factors(
            torch.ones(layer.out_features, 3), torch.ones(3, layer.in_features), scale=1.0
        )
        for layer in adapter.layers.values()
    ]
    write(adapter.with_layers(changed), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert written["r"] == 3
    assert written["lora_alpha"] == 3
    assert isinstance(written["lora_alpha"], int)
    assert written["rank_pattern"] == {}
    assert written["alpha_pattern"] == {}
    assert written["lora_dropout"] == 0.1


def test_paths_that_end_alike_keep_their_own_rank(tmp_path):
    # "fc" as a pattern also matches the end of "h.fc": the written keys must tell them apart.
    layers = [
        LoraLayer(name, torch.ones(rank, 4), torch.ones(6, rank), 0.5)
        for name, rank in (("a.fc", 2), ("b.fc", 2), ("fc", 3), ("h.fc", 4), ("h.fc2", 2))
    ]
    config = plain_config(r=2, target_modules=["fc"])
    source = Adapter({}, config, {}, tmp_path, (), "sha256:0").with_layers(layers)
    write(source, tmp_path / "out")
    again = read_adapter(tmp_path / "out")
    got = {name: (x.rank, x.scale) for name, x in again.layers.items()}
    assert got == {layer.module: (layer.rank, layer.scale) for layer in layers}
    assert again.config["target_modules"] == [layer.module for layer in layers]


def test_missing_and_renamed_layers_narrow_target_modules(tmp_path):
    model = save_adapter(llama(), tmp_path / "in", r=4, target_modules=ATTENTION)
    adapter = read_adapter(tmp_path / "in")
    kept = [layer for layer in adapter.layers.values() if "layers.0" in layer.module]
    write(adapter.with_layers(kept), tmp_path / "out")
    loaded = load_adapter(llama(), tmp_path / "out")
    assert loaded.targeted_module_names == [layer.module for layer in kept]
    assert len(kept) * 2 == len(model.targeted_module_names)

    moved = [layer.with_factors(layer.lora_B, layer.lora_A, module="x.out") for layer in kept[:1]]
    write(adapter.with_layers(moved), tmp_path / "moved")
    assert read_adapter(tmp_path / "moved").config["target_modules"] == ["x.out"]


def test_an_init_that_would_touch_the_new_base_is_switched_off(tmp_path):
    base = llama()
    adapted = peft.get_peft_model(
        base, peft.LoraConfig(r=4, target_modules=ATTENTION, init_lora_weights="pissa")
    )
    adapted.save_pretrained(tmp_path / "in")
    adapter = read_adapter(tmp_path / "in", drop=["mutated_init"])
    assert adapter.dropped_kinds == ("mutated_init",)
    write(adapter, tmp_path / "out")
    loaded = load_adapter(llama(), tmp_path / "out").get_base_model()
    for name in adapter.layers:
        stock = llama().get_submodule(name).weight
        assert torch.equal(loaded.get_submodule(name).base_layer.weight, stock)


# Loading the initial adapter beside the trained one is part of peft's own conversion.
@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights of the model:UserWarning")
def test_a_converted_pissa_adapter_is_a_plain_update(tmp_path):
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=ATTENTION, init_lora_weights="pissa")
    model = peft.get_peft_model(llama(), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(1.1)
    expected = outputs(model.eval(), llama)
    model.save_pretrained(
        tmp_path / "in", path_initial_model_for_weight_conversion=str(tmp_path / "initial")
    )
    adapter = read_adapter(tmp_path / "in")
    assert {layer.rank for layer in adapter.layers.values()} == {8}
    write(adapter, tmp_path / "out")
    actual = outputs(load_adapter(llama(), tmp_path / "out"), llama)
    # W - B0 A0 is rounded to fp32 when the base is changed, and undone by adding B0 A0 back.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_what_is_dropped_is_switched_off(tmp_path):
    targets = ["q_proj", "embed_tokens"]
    save_adapter(llama(), tmp_path / "in", r=4, target_modules=targets, modules_to_save=["lm_head"])
    adapter = read_adapter(tmp_path / "in", drop=["embedding", "modules_to_save"])
    assert set(adapter.dropped_kinds) == {"embedding", "modules_to_save"}
    stem = "base_model.model."
    assert set(adapter.dropped) == {
        f"{stem}model.embed_tokens.lora_embedding_A",
        f"{stem}model.embed_tokens.lora_embedding_B",
        f"{stem}model.embed_tokens.base_layer.weight",
        f"{stem}lm_head.weight",
    }
    write(adapter, tmp_path / "out")
    model = load_adapter(llama(), tmp_path / "out")
    assert model.targeted_module_names == list(adapter.layers)
    assert model.peft_config["default"].modules_to_save is None


def test_config_and_metadata_are_kept_and_updated(tmp_path):
    config = plain_config(
        base_model_name_or_path="org/source",
        revision="abc",
        inference_mode=False,
        lora_dropout=0.25,
        custom_note="kept",
    )
    path = write_files(tmp_path / "in", config, plain_tensors(), {"format": "x", "who": "me"})
    adapter = read_adapter(path)
    assert adapter.base_model == "org/source"
    assert adapter.metadata == {"format": "x", "who": "me"}
    files = write(adapter, tmp_path / "out", provenance={"method": "copy", "command": "a\udcffb"})
    assert [file.name for file in files] == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    ]
    assert all(file.is_file() for file in files)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(f.name for f in files)
    written = json.loads(files[0].read_text())
    changed = {
        "base_model_name_or_path": "org/target",
        "revision": None,
        "inference_mode": True,
    }
    assert written == {**config, **changed}
    with safe_open(files[1], framework="pt") as handle:
        assert handle.metadata() == {
            "format": "pt",
            "who": "me",
            "lorax_transfer.method": "copy",
            "lorax_transfer.command": "a\\udcffb",
        }
    assert files[2].read_text() == "# Card\n"


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), plain_tensors()))
    provenance = {letter: letter for letter in "qwertyuiopasdf"}
    hashes = set()
    for name in ("one", "two", "three"):
        write(adapter, tmp_path / name, provenance=provenance)
        hashes.add(read_adapter(tmp_path / name).content_hash)
    assert len(hashes) == 1
    assert hashes.pop().startswith("sha256:")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, None], ids=str)
def test_dtype(tmp_path, dtype):
    tensors = {name: t.to(torch.float16) for name, t in plain_tensors().items()}
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), tensors))
    write(adapter, tmp_path / "out", dtype=dtype)
    written = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(written) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(written[name], tensor.to(dtype or torch.float16))


def test_a_factor_that_overflows_its_dtype_is_named(tmp_path):
    tensors = plain_tensors()
    tensors["base_model.model.h.0.fc.lora_B.weight"] *= 1e6
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), tensors))
    with pytest.raises(OutputError, match=r"lora_B of h\.0\.fc is not finite as torch\.float16"):
        write(adapter, tmp_path / "out", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_factors_that_are_views_of_shared_memory_are_written(tmp_path):
    basis = torch.arange(128.0).reshape(8, 16)
    layers = [
        LoraLayer("a", basis[:4], basis.T[:, :4], 1.0),
        LoraLayer("b", basis[:4], basis.T[:, 4:], 1.0),
    ]
    config = plain_config(target_modules=["a", "b"])
    source = Adapter({}, config, {}, tmp_path, (), "sha256:0").with_layers(layers)
    write(source, tmp_path / "out")
    again = read_adapter(tmp_path / "out")
    for layer in layers:
        assert torch.equal(again.layers[layer.module].lora_A, layer.lora_A)
        assert torch.equal(again.layers[layer.module].lora_B, layer.lora_B)


def test_existing_output(tmp_path):
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), plain_tensors()))
    write(adapter, tmp_path / "out")
    with pytest.raises(OutputError, match="already exists"):
        write(adapter, tmp_path / "out")
    write(adapter, tmp_path / "out", overwrite=True, base_model_name_or_path="org/other")
    assert read_adapter(tmp_path / "out").base_model == "org/other"
    # Onto its own input: everything was read before.
    write(adapter, tmp_path / "in", overwrite=True, base_model_name_or_path="org/other")
    assert read_adapter(tmp_path / "in").base_model == "org/other"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError], ids=lambda e: e.__name__)
def test_interrupted_writing_leaves_what_was_there(tmp_path, monkeypatch, error):
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), plain_tensors()))
    write(adapter, tmp_path / "out")
    before = read_adapter(tmp_path / "out")

    def half_written(tensors, file, metadata):
        file.write_bytes(b"half")
        raise error("no space")

    monkeypatch.setattr("lorax_transfer.adapters.peft.save_file", half_written)
    expected = KeyboardInterrupt if error is KeyboardInterrupt else OutputError
    for name in ("out", "new"):
        with pytest.raises(expected, match="no space"):
            write(adapter, tmp_path / name, overwrite=True, base_model_name_or_path="other")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    after = read_adapter(tmp_path / "out")
    assert (after.content_hash, after.config) == (before.content_hash, before.config)


@pytest.mark.parametrize("content", ["notes.txt", "checkpoint-1/x"], ids=["file", "directory"])
def test_overwriting_deletes_nothing_but_an_adapter(tmp_path, content):
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), plain_tensors()))
    if "/" in content:
        write(adapter, tmp_path / "out")
    precious = tmp_path / "out" / content
    precious.parent.mkdir(parents=True, exist_ok=True)
    precious.write_text("keep me")
    with pytest.raises(OutputError, match="not overwritten"):
        write(adapter, tmp_path / "out", overwrite=True)
    assert precious.read_text() == "keep me"


def test_two_layers_of_one_module_are_refused(tmp_path):
    adapter = read_adapter(write_files(tmp_path / "in", plain_config(), plain_tensors()))
    layer = adapter.layers["h.0.fc"]
    with pytest.raises(AdapterError, match=r"two layers were given for h\.0\.fc"):
        adapter.with_layers([layer, layer])


def test_conv_layer_properties():
    layer = LoraLayer("conv", torch.randn(4, 3, 3, 2), torch.randn(8, 4, 1, 1), 0.5)
    assert (layer.rank, layer.in_features, layer.out_features) == (4, 3, 8)
    assert layer.is_conv
    assert layer.kernel_size == (3, 2)
    assert layer.matrix_A.shape == (4, 18)
    assert layer.matrix_B.shape == (8, 4)
    again = layer.with_factors(layer.matrix_B, layer.matrix_A)
    assert torch.equal(again.lora_A, layer.lora_A)
    assert torch.equal(again.lora_B, layer.lora_B)
    assert again.scale == 0.5
    with pytest.raises(AdapterError, match="expected matrices"):
        layer.with_factors(torch.ones(8, 4), torch.ones(4, 17))
