# SPDX-License-Identifier: Apache-2.0
"""A LoRA-X adapter as an ordinary LoRA: stock PEFT computes the same."""

import copy
import json
from pathlib import Path
from typing import Any

import adapter_makers
import lorax_makers
import pairs
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import lorax_transfer
from lorax_transfer import cli
from lorax_transfer.errors import AdapterError, MatchError, OutputError
from lorax_transfer.peft import add_lorax_adapter, load_lorax_adapter, save_as_lora

KINDS = ["llama", "gpt2", "convnet"]
CORES: list[Any] = [
    pytest.param({"core": "diagonal", "scale": 2.0}, id="diagonal"),
    pytest.param({"core": "full"}, id="full"),
    pytest.param({"core": "banded", "bandwidth": 2}, id="banded"),
    pytest.param({"core": "full", "energy": 0.5, "rank": 32}, id="ranks-differ"),
]


def _check(model: torch.nn.Module, kind: str, path: Path) -> None:
    plain = adapter_makers.load_adapter(lorax_makers.MODELS[kind](), path)
    # Two orders of the same float32 products.
    expected = lorax_makers.run(model)
    torch.testing.assert_close(lorax_makers.run(plain), expected, rtol=0, atol=1e-5)
    base = lorax_makers.run(lorax_makers.MODELS[kind]())
    assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CORES[:2])
def test_folded_in_memory(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    model = lorax_makers.adapted(kind, **options)
    save_as_lora(model, tmp_path / "lora")
    _check(model, kind, tmp_path / "lora")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", CORES[2:])
def test_folded_from_files(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    pairs.save_model(lorax_makers.MODELS[kind](), tmp_path / "base")
    model = lorax_makers.saved(kind, tmp_path / "native", **options)
    lorax_transfer.fold(tmp_path / "native", tmp_path / "base", tmp_path / "lora")
    _check(model, kind, tmp_path / "lora")


def test_command_line(tmp_path: Path) -> None:
    pairs.save_model(lorax_makers.MODELS["llama"](), tmp_path / "base")
    model = lorax_makers.saved("llama", tmp_path / "native")
    arguments = ["fold", tmp_path / "native", "--base", tmp_path / "base", "-o", tmp_path / "lora"]
    arguments += ["--dtype", "bf16"]
    result = CliRunner().invoke(cli.app, [str(x) for x in arguments])
    assert result.exit_code == 0, result.output
    tensors = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    plain = adapter_makers.load_adapter(lorax_makers.MODELS["llama"](), tmp_path / "lora")
    # Factors of eight bits.
    torch.testing.assert_close(lorax_makers.run(plain), lorax_makers.run(model), rtol=0, atol=0.02)
    again = CliRunner().invoke(cli.app, [str(x) for x in arguments])
    assert again.exit_code == 1
    assert "already exists" in again.output


def test_layouts_are_told_apart_whatever_the_flag_says(tmp_path: Path) -> None:
    # As one flag for a whole adapter is, in a model that mixes both layouts.
    pairs.save_model(lorax_makers.MODELS["gpt2"](), tmp_path / "base")
    model = lorax_makers.saved("gpt2", tmp_path / "native")
    file = tmp_path / "native" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["fan_in_fan_out"]
    file.write_text(json.dumps({**config, "fan_in_fan_out": False}))
    lorax_transfer.fold(tmp_path / "native", tmp_path / "base", tmp_path / "lora")
    _check(model, "gpt2", tmp_path / "lora")


def test_another_base_is_refused(tmp_path: Path) -> None:
    other = lorax_makers.trained_copy(lorax_makers.MODELS["llama"](), 1e-6)
    pairs.save_model(other, tmp_path / "base")
    lorax_makers.saved("llama", tmp_path / "native")
    with pytest.raises(AdapterError, match="absent does not exist"):
        lorax_transfer.fold(tmp_path / "absent", tmp_path / "base", tmp_path / "lora")
    with pytest.raises(MatchError, match="not the weight that the core of"):
        lorax_transfer.fold(tmp_path / "native", tmp_path / "base", tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "options", [{"dilation": 2}, {"padding": 1, "padding_mode": "reflect"}], ids=["dilated", "pad"]
)
def test_files_know_of_convolutions_that_an_ordinary_lora_passes_over(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    def made(seed: int, path: Path) -> torch.nn.Module:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 6, 3, **options))
        pairs.save_model(model, path)
        return model

    source, target = made(0, tmp_path / "source"), made(1, tmp_path / "target")
    model = add_lorax_adapter(copy.deepcopy(source), 4, target_modules=["0", "1"])
    adapter_makers.randomise(model)
    native = tmp_path / "native"
    model.save_pretrained(native)
    x = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(load_lorax_adapter(source, native)(x), model(x))

    places = (native, tmp_path / "source", tmp_path / "target", tmp_path / "lora")
    message = "1 is a convolution with dilation"
    with pytest.raises(AdapterError, match=message):
        lorax_transfer.fold(native, tmp_path / "source", tmp_path / "lora")
    for more in ({"form": "lora"}, {"method": "copy"}, {"embeddings": 0.5}):
        with pytest.raises(AdapterError, match=message):
            lorax_transfer.transfer(*places, **more)
    assert not (tmp_path / "lora").exists()
    # What is moved as cores still knows.
    lorax_transfer.transfer(native, tmp_path / "source", tmp_path / "target", tmp_path / "moved")
    load_lorax_adapter(target, tmp_path / "moved")
    with pytest.raises(AdapterError, match=message):
        lorax_transfer.fold(tmp_path / "moved", tmp_path / "target", tmp_path / "lora")

    config = json.loads((native / "adapter_config.json").read_text())
    assert config["convolutions"]["0"]["stride"] == [1, 1]
    # A file from before they were recorded, and one that is damaged.
    for recorded, error in ((None, None), ({"1": {"stride": [1, 1]}}, "expected dilation and")):
        changed = {key: value for key, value in config.items() if key != "convolutions"}
        if recorded is not None:
            changed["convolutions"] = recorded
        (native / "adapter_config.json").write_text(json.dumps(changed))
        if error is None:
            lorax_transfer.fold(native, tmp_path / "source", tmp_path / "lora")
        else:
            with pytest.raises(AdapterError, match=error):
                lorax_transfer.fold(native, tmp_path / "source", tmp_path / "other")


def test_what_an_ordinary_lora_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, dilation=2))
    model = add_lorax_adapter(model, 4, target_modules=["0"])
    with pytest.raises(AdapterError, match="dilation"):
        save_as_lora(model, tmp_path / "lora")
    with pytest.raises(AdapterError, match="no LoRA-X adapter 'other'"):
        save_as_lora(model, tmp_path / "lora", "other")
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="already exists"):
        save_as_lora(lorax_makers.adapted("convnet"), tmp_path / "taken")
