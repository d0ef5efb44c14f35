# SPDX-License-Identifier: Apache-2.0
"""The native form of a LoRA-X adapter: saved, found again on its base, refused on any other."""

import copy
import json
from pathlib import Path

import lorax_makers
import oracle
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorax_kernels as lk
from lorax_transfer.adapters import lorax_form, read_adapter
from lorax_transfer.adapters.lorax import read_lorax
from lorax_transfer.errors import AdapterError, MatchError
from lorax_transfer.peft import LoraXConfig, load_lorax_adapter, lorax_layers

FORMS = [
    pytest.param({"core": "diagonal"}, id="diagonal"),
    pytest.param({"core": "full"}, id="full"),
    pytest.param({"core": "banded", "bandwidth": 2}, id="banded"),
    pytest.param({"core": "full", "scale": 3.0}, id="scaled"),
    pytest.param({"core": "full", "energy": 0.5, "rank": 32}, id="energy"),
]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(pytest.param("llama", *form.values, id=f"llama-{form.id}") for form in FORMS),
        *(pytest.param("gpt2", *form.values, id=f"gpt2-{form.id}") for form in FORMS[1:3]),
        *(pytest.param("convnet", *form.values, id=f"convnet-{form.id}") for form in FORMS[3:]),
    ],
)
def test_loaded_is_what_was_saved(tmp_path: Path, kind: str, options: dict) -> None:
    model = lorax_makers.saved(kind, tmp_path, **options)
    loaded = load_lorax_adapter(lorax_makers.MODELS[kind](), tmp_path).eval()
    with torch.no_grad():
        expected, found = lorax_makers.run(model), lorax_makers.run(loaded)
        base = lorax_makers.run(lorax_makers.MODELS[kind]())
    # The same bases to rounding; energies are decided once, when the adapter is made.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (found - base).abs().max() > 1e-2


@pytest.mark.parametrize("low", [False, True], ids=["whole", "low_cpu_mem_usage"])
def test_peft_loads_it_with_its_configuration(tmp_path: Path, low: bool) -> None:
    model = lorax_makers.saved("llama", tmp_path)
    config = LoraXConfig.from_pretrained(tmp_path)
    base = lorax_makers.MODELS["llama"]()
    loaded = peft.PeftModel.from_pretrained(base, tmp_path, config=config, low_cpu_mem_usage=low)
    with torch.no_grad():
        torch.testing.assert_close(lorax_makers.run(loaded.eval()), lorax_makers.run(model))


def test_stock_peft_does_not_take_it_for_a_lora(tmp_path: Path) -> None:
    lorax_makers.saved("llama", tmp_path)
    with pytest.raises(KeyError, match="LORA_X"):
        peft.PeftModel.from_pretrained(lorax_makers.MODELS["llama"](), tmp_path)


def test_file_is_small_and_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one", "two"):
        lorax_makers.saved("llama", tmp_path / name, core="diagonal")
    files = [
        [(tmp_path / name / file).read_bytes() for name in ("one", "two")]
        for file in ("adapter_config.json", "adapter_model.safetensors")
    ]
    assert all(one == two for one, two in files)
    tensors = load_file(tmp_path / "one" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for name, tensor in tensors.items() if "weight" in name)
    assert numbers == 14 * 6
    assert sum(tensor.nbytes for tensor in tensors.values()) == 14 * (6 * 4 + 2 * 6 * 4 + 16)


@pytest.mark.parametrize("options", FORMS[:4])
def test_signs_are_found_again(tmp_path: Path, options: dict) -> None:
    # As a device would store it that settled the signs of some pairs the other way round.
    model = lorax_makers.saved("llama", tmp_path, **options)
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0, -1.0, 1.0])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name, tensor in tensors.items():
        if name.endswith("probe"):
            tensors[name] = tensor * flips
        elif name.endswith("weight"):
            found = _flipped(tensor, options["core"], flips)
            tensors[name] = found
    save_file(tensors, file)
    loaded = load_lorax_adapter(lorax_makers.MODELS["llama"](), tmp_path)
    for name, delta in lorax_makers.deltas(model).items():
        torch.testing.assert_close(lorax_makers.deltas(loaded)[name], delta, rtol=0, atol=1e-6)


def _flipped(core: torch.Tensor, form: str, flips: torch.Tensor) -> torch.Tensor:
    if form == "diagonal":
        return core
    dense = flips[:, None] * lorax_form.dense_core(core, form) * flips
    if form == "full":
        return dense
    width, rank = len(core) // 2, core.shape[1]
    banded = torch.zeros_like(core)
    for d in range(-width, width + 1):
        banded[width + d, : rank - abs(d)] = torch.diagonal(dense, d)
    return banded


def test_another_base_is_refused(tmp_path: Path) -> None:
    lorax_makers.saved("llama", tmp_path)
    other = lorax_makers.trained_copy(lorax_makers.MODELS["llama"](), drift=1e-6)
    with pytest.raises(MatchError, match="not the one that the adapter was trained on"):
        load_lorax_adapter(copy.deepcopy(other), tmp_path)
    config = LoraXConfig.from_pretrained(tmp_path)
    with pytest.raises(MatchError, match="not the one that the adapter was trained on"):
        peft.PeftModel.from_pretrained(copy.deepcopy(other), tmp_path, config=config)


def test_other_vectors_of_the_same_weight_are_refused(tmp_path: Path) -> None:
    lorax_makers.saved("llama", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("probe"))
    # Two vectors turned against each other by a hundredth of a right angle.
    angle = torch.tensor(0.0157)
    turned = tensors[name].clone()
    turned[:, 1] = angle.cos() * tensors[name][:, 1] + angle.sin() * tensors[name][:, 2]
    turned[:, 2] = angle.cos() * tensors[name][:, 2] - angle.sin() * tensors[name][:, 1]
    save_file({**tensors, name: turned}, file)
    with pytest.raises(AdapterError, match="singular vectors differ by"):
        load_lorax_adapter(lorax_makers.MODELS["llama"](), tmp_path)


def test_a_model_loaded_in_more_digits_than_in_training(tmp_path: Path) -> None:
    made = lorax_makers.MODELS["llama"]
    rounded = peft.get_peft_model(
        made().to(torch.bfloat16), LoraXConfig(r=6, target_modules="all-linear")
    )
    for layer in lorax_layers(rounded).values():
        torch.nn.init.normal_(layer.lora_core["default"].weight, std=0.3)
    rounded.save_pretrained(tmp_path)
    loaded = load_lorax_adapter(made(), tmp_path)
    for name, delta in lorax_makers.deltas(rounded).items():
        torch.testing.assert_close(lorax_makers.deltas(loaded)[name], delta, rtol=0, atol=1e-6)


def test_vectors_agree_with_float64_to_seven_digits() -> None:
    model = lorax_makers.adapted("llama", 32)
    for layer in lorax_layers(model).values():
        U, _, V = oracle.exact_svd(layer.base_matrix(), layer.r["default"])
        # Rounding to float32, 6e-8, over gaps of a hundredth.
        for exact, factor in (
            (U, layer.left_of("default").basis),
            (V, layer.right_of("default").basis.T),
        ):
            sign = (exact * factor.double()).sum(0).sign()
            assert (exact * sign - factor.double()).abs().max() < 2e-6


def test_probe_does_not_depend_on_the_device_or_version() -> None:
    # Written out once: a change would make every adapter on disk unreadable.
    found = lorax_form.probe(torch.eye(5)[:, :3])
    expected = torch.tensor(
        [[-1.213701, -0.781225, -0.1955508], [-0.1591544, 1.2727394, -1.2013491]]
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_digest_is_of_dtype_shape_and_values() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    one = lorax_form.digest(weight)
    assert bytes(one.tolist()).hex() == "a35366818b22f99f20e17b7b216ff7ff"
    for other in (weight.T, weight.bfloat16(), weight + 1e-7, weight.reshape(3, 2)):
        assert not torch.equal(lorax_form.digest(other), one)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        pytest.param(torch.zeros(8, 6), "is zero", id="zero"),
        pytest.param(torch.eye(8), "singular values", id="ties"),
    ],
)
def test_undetermined_vectors_are_refused(weight: torch.Tensor, message: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(*weight.shape[::-1]))
    model[0].weight.data = weight
    with pytest.raises(AdapterError, match=message):
        peft.get_peft_model(model, LoraXConfig(r=4, target_modules=["0"]))


def test_directions_without_weight_are_left_out() -> None:
    weight = torch.randn(12, 3) @ torch.randn(3, 10)
    svd = lk.truncated_svd(weight.double(), 6)
    assert lorax_form.check_basis(svd, "layer").rank == 3


def _break(tmp_path: Path, change: dict) -> Path:
    lorax_makers.saved("convnet", tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    return tmp_path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"format_version": 2}, "format_version 2", id="later"),
        pytest.param({"peft_type": "LOHA"}, "no LoRA-X adapter", id="other"),
        pytest.param({"core": "ring"}, "'ring'", id="form"),
        pytest.param({"scale": None}, "scale None", id="scale"),
        pytest.param({"core": "diagonal"}, "has shape", id="shape"),
    ],
)
def test_broken_configurations_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        read_lorax(_break(tmp_path, change))


def test_unknown_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="unexpected keyword argument 'twist'"):
        LoraXConfig.from_pretrained(str(_break(tmp_path, {"twist": 1})))
    with pytest.raises(AdapterError, match="no LoRA-X adapter"):
        LoraXConfig.from_pretrained(str(_break(tmp_path, {"peft_type": "LORA"})))


@pytest.mark.parametrize("part", ["weight", "probe", "digest"])
def test_missing_tensors_are_refused(tmp_path: Path, part: str) -> None:
    lorax_makers.saved("convnet", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: x for name, x in tensors.items() if name != _name("conv", part)}, file)
    with pytest.raises(AdapterError, match=f"no {part} for conv"):
        read_lorax(tmp_path)


def test_foreign_and_infinite_tensors_are_refused(tmp_path: Path) -> None:
    lorax_makers.saved("convnet", tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "base_model.model.conv.lora_A.weight": torch.ones(2)}, file)
    with pytest.raises(AdapterError, match="no part of a LoRA-X adapter"):
        read_lorax(tmp_path)
    name = _name("conv", "weight")
    save_file({**tensors, name: torch.full_like(tensors[name], float("inf"))}, file)
    with pytest.raises(AdapterError, match="NaN or Inf"):
        read_lorax(tmp_path)


def _name(module: str, part: str) -> str:
    return f"base_model.model.{module}.lora_core.{part}"


def test_readers_of_factors_point_to_fold(tmp_path: Path) -> None:
    lorax_makers.saved("convnet", tmp_path)
    with pytest.raises(AdapterError, match="lorax-transfer fold"):
        read_adapter(tmp_path)


def test_modules_that_the_model_lacks_are_an_error(tmp_path: Path) -> None:
    lorax_makers.saved("llama", tmp_path)
    with pytest.raises(MatchError, match="has no module"):
        load_lorax_adapter(lorax_makers.MODELS["convnet"](), tmp_path)
