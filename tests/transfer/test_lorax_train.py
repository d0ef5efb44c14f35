# SPDX-License-Identifier: Apache-2.0
"""LoRA-X adapters in PEFT: what trains, with what, and what stays as it was."""

import copy
from pathlib import Path
from typing import Any

import adapter_makers
import lorax_makers
import peft
import pytest
import torch
import transformers

from lorax_transfer.errors import AdapterError
from lorax_transfer.peft import LoraXConfig, add_lorax_adapter, load_lorax_adapter, lorax_layers

CORES = [
    pytest.param({"core": "diagonal"}, id="diagonal"),
    pytest.param({"core": "full"}, id="full"),
    pytest.param({"core": "banded", "bandwidth": 1}, id="banded"),
    pytest.param({"core": "full", "scale": 0.5}, id="scaled"),
]


def _tokens(count: int = 4) -> torch.Tensor:
    return torch.randint(0, 64, (count, 12), generator=torch.Generator().manual_seed(5))


def _loss(model: torch.nn.Module, kind: str) -> torch.Tensor:
    if kind == "convnet":
        generator = torch.Generator().manual_seed(5)
        images = torch.randn(16, 3, 8, 8, generator=generator)
        labels = torch.arange(16) % 5
        return torch.nn.functional.cross_entropy(model(images), labels)
    tokens = _tokens()
    return model(input_ids=tokens, labels=tokens).loss


def _train(model: torch.nn.Module, kind: str, steps: int = 12, lr: float = 0.05) -> list[float]:
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = _loss(model, kind)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        *(pytest.param("llama", *core.values, id=f"llama-{core.id}") for core in CORES[:2]),
        *(pytest.param("gpt2", *core.values, id=f"gpt2-{core.id}") for core in CORES[2:]),
        *(pytest.param("convnet", *core.values, id=f"convnet-{core.id}") for core in CORES),
    ],
)
def test_only_the_cores_learn(kind: str, options: dict[str, Any]) -> None:
    base = lorax_makers.MODELS[kind]()
    before = float(_loss(base, kind).detach())
    model = add_lorax_adapter(base, 8, target_modules=lorax_makers.TARGETS[kind], **options)
    trained = {name for name, x in model.named_parameters() if x.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if "lora_core" in name}
    frozen = {n: x.detach().clone() for n, x in model.named_parameters() if n not in trained}
    losses = _train(model, kind)
    # The core starts from zero, so that training starts from the base model itself.
    assert losses[0] == pytest.approx(before, rel=1e-6)
    assert losses[-1] < losses[0] - 0.02
    for name, x in model.named_parameters():
        assert name in trained or torch.equal(x, frozen[name]), name


@pytest.mark.parametrize("kind", ["llama", "gpt2", "convnet"])
def test_update_is_what_its_parts_multiply_to(kind: str) -> None:
    model = lorax_makers.adapted(kind, scale=2.0)
    for name, layer in lorax_layers(model).items():
        U, _, Vh = torch.linalg.svd(layer.base_matrix().double(), full_matrices=False)
        core, k = layer.core_of("default"), layer.r["default"]
        # The sign that the package settles on: the largest entry of u is positive.
        sign = U[:, :k].gather(0, U[:, :k].abs().argmax(0, keepdim=True)).sign()
        C = 2.0 * core.weight.detach().double()
        expected = (U[:, :k] * sign) @ C @ (Vh[:k].T * sign).T
        found = lorax_makers.deltas(model)[name]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "convnet"])
def test_merged_and_taken_out_again(kind: str) -> None:
    model = lorax_makers.adapted(kind)
    weights = {name: layer.base_weight.clone() for name, layer in lorax_layers(model).items()}
    apart = lorax_makers.run(model)
    model.merge_adapter()
    torch.testing.assert_close(lorax_makers.run(model), apart, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    for name, layer in lorax_layers(model).items():
        # Added and subtracted in float32.
        torch.testing.assert_close(layer.base_weight, weights[name], rtol=0, atol=1e-6)
    whole = model.merge_and_unload(safe_merge=True)
    assert not lorax_layers(whole)
    torch.testing.assert_close(lorax_makers.run(whole), apart, rtol=0, atol=1e-5)


def test_disabled_it_is_the_base_model() -> None:
    model = lorax_makers.adapted("llama")
    base = lorax_makers.run(lorax_makers.MODELS["llama"]())
    adapted = lorax_makers.run(model)
    with model.disable_adapter():
        assert torch.equal(lorax_makers.run(model), base)
    assert torch.equal(lorax_makers.run(model), adapted)


def test_several_adapters_and_an_ordinary_one() -> None:
    model = lorax_makers.adapted("llama", 6)
    first = lorax_makers.run(model)
    add_lorax_adapter(model, 4, core="diagonal", adapter_name="second")
    assert torch.equal(lorax_makers.run(model), first)
    plain = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    model.add_adapter("plain", plain)
    names = {"default": "lora_core", "second": "lora_core", "plain": "lora_[AB]"}
    for name, part in names.items():
        model.set_adapter(name)
        trained = [n for n, x in model.named_parameters() if x.requires_grad]
        assert trained
        assert all(f".{name}" in n for n in trained)
        assert all(("lora_core" in n) == (part == "lora_core") for n in trained)
    model.base_model.set_adapter(["default", "second"])
    assert not any(x.requires_grad for n, x in model.named_parameters() if "lora_A" in n)
    model.set_adapter("default")
    assert torch.equal(lorax_makers.run(model), first)
    model.delete_adapter("second")
    assert not lorax_layers(model, "second")
    mixed = model(input_ids=_tokens(2), adapter_names=["default", "__base__"]).logits
    model.set_adapter("default")
    torch.testing.assert_close(mixed[:1], model(input_ids=_tokens(2)[:1]).logits)


def test_a_frozen_adapter_thaws_without_its_bases() -> None:
    model = lorax_makers.adapted("llama")
    model.set_requires_grad("default", False)
    assert not any(x.requires_grad for x in model.parameters())
    model.set_requires_grad("default", True)
    assert all("lora_core" in n for n, x in model.named_parameters() if x.requires_grad)


# Old names of options that every release of transformers 5 knows.
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
def test_trainer_with_gradient_checkpointing(tmp_path: Path, reentrant: bool) -> None:
    pytest.importorskip("accelerate")
    tokens = _tokens(8)
    data = [{"input_ids": row, "labels": row} for row in tokens]

    def trainer(model: torch.nn.Module, steps: int) -> transformers.Trainer:
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=0.05,
            lr_scheduler_type="constant",
            save_steps=3,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            seed=1,
        )
        return transformers.Trainer(model, arguments, train_dataset=data)

    def fresh() -> torch.nn.Module:
        return add_lorax_adapter(adapter_makers.llama(), 8, task_type="CAUSAL_LM")

    model = fresh()
    trainer(model, 6).train()
    plain = fresh()
    with torch.no_grad():
        assert _loss(model.eval(), "llama") < _loss(plain.eval(), "llama")
    # Stopped after three steps and gone on with: the same adapter.
    resumed = fresh()
    trainer(resumed, 6).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, layer in lorax_layers(model).items():
        other = lorax_layers(resumed)[name].core_of("default").weight
        torch.testing.assert_close(layer.core_of("default").weight, other, rtol=0, atol=1e-6)
    # A checkpoint is the native form.
    loaded = load_lorax_adapter(adapter_makers.llama(), tmp_path / "checkpoint-6")
    torch.testing.assert_close(lorax_makers.run(loaded.eval()), lorax_makers.run(model.eval()))


def test_bfloat16_base_keeps_core_and_bases_in_float32() -> None:
    model = add_lorax_adapter(adapter_makers.llama().to(torch.bfloat16), 8)
    losses = _train(model, "llama", lr=0.1)
    assert losses[-1] < losses[0] - 0.05
    for layer in lorax_layers(model).values():
        assert layer.core_of("default").weight.dtype == torch.float32
        assert layer.left_of("default").basis.dtype == torch.float32
        assert layer.left_of("default").weight.dtype == torch.bfloat16


def test_a_cast_of_the_model_casts_no_basis() -> None:
    model = lorax_makers.adapted("llama")
    before = copy.deepcopy(lorax_makers.deltas(model))
    model.to(torch.bfloat16)
    assert next(model.base_model.model.lm_head.parameters()).dtype == torch.bfloat16
    assert lorax_makers.run(model).dtype == torch.bfloat16
    for name, delta in lorax_makers.deltas(model).items():
        assert torch.equal(delta, before[name])


def test_autocast_computes_in_bfloat16() -> None:
    model = lorax_makers.adapted("llama")
    exact = lorax_makers.run(model)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = lorax_makers.run(model)
    # Eight bits a product, over two layers.
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.05)


def test_dropout_acts_in_training_only() -> None:
    model = lorax_makers.adapted("llama", lora_dropout=0.5)
    still = lorax_makers.run(model)
    assert torch.equal(lorax_makers.run(model), still)
    model.train()
    assert not torch.equal(lorax_makers.run(model), still)


def test_energy_decides_the_rank_before_an_optimizer_sees_it() -> None:
    model = add_lorax_adapter(adapter_makers.llama(), 32, energy=0.5)
    for layer in lorax_layers(model).values():
        S = torch.linalg.svdvals(layer.base_matrix().double()).square()
        k = layer.r["default"]
        assert S[:k].sum() >= 0.5 * S.sum() > S[: k - 1].sum()
        assert layer.core_of("default").weight.shape == (k, k)
        assert layer.scaling["default"] == 1.0


def test_bases_are_read_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = add_lorax_adapter(adapter_makers.llama(), 6, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == len(lorax_layers(first))
    monkeypatch.setattr("lorax_kernels.truncated_svd", _must_not_run)
    second = add_lorax_adapter(adapter_makers.llama(), 6, cache=tmp_path)
    for name, layer in lorax_layers(second).items():
        basis = lorax_layers(first)[name].left_of("default").basis
        assert torch.equal(layer.left_of("default").basis, basis)


def _must_not_run(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("a basis was computed that is in the cache")


class _Dilated(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        options = {"stride": 2, "padding": 2, "dilation": 2, "padding_mode": "reflect"}
        self.conv = torch.nn.Conv2d(3, 8, 3, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


def test_a_convolution_keeps_its_stride_padding_and_dilation() -> None:
    model = add_lorax_adapter(_Dilated(), 6, target_modules=["conv"])
    adapter_makers.randomise(model)
    x = torch.randn(2, 3, 9, 9)
    apart = model(x)
    torch.testing.assert_close(model.merge_and_unload()(x), apart, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"core": "dense"}, "core is 'dense'", id="core"),
        pytest.param({"rank": 0}, "r is 0", id="rank"),
        pytest.param({"energy": 1.5}, "energy is 1.5", id="energy"),
        pytest.param({"scale": 0.0}, "scale is 0.0", id="scale"),
        pytest.param({"core": "banded"}, "bandwidth is 0", id="bandwidth"),
        pytest.param({"lora_alpha": 16}, "set scale", id="alpha"),
        pytest.param({"use_dora": True}, "use_dora", id="dora"),
        pytest.param({"task_type": "SEQ_CLS"}, "a head", id="head"),
        pytest.param({"init_lora_weights": "pissa"}, "init_lora_weights", id="init"),
        pytest.param({"bias": "all"}, "bias is an option", id="bias"),
        pytest.param({"modules_to_save": ["lm_head"]}, "modules_to_save", id="modules"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        add_lorax_adapter(adapter_makers.llama(), **{"rank": 4, **options})


def test_a_layer_of_an_ordinary_lora_is_refused() -> None:
    model = peft.get_peft_model(
        adapter_makers.llama(), peft.LoraConfig(r=2, target_modules=["q_proj"])
    )
    for targets in (["q_proj"], "all-linear"):
        with pytest.raises(AdapterError, match="has an ordinary LoRA already"):
            add_lorax_adapter(model, 4, adapter_name="x", target_modules=targets)
    # Through PEFT's own door its layer refuses it.
    with pytest.raises(ValueError, match="lora_x"):
        model.add_adapter("x", LoraXConfig(r=4, target_modules=["q_proj"]))
    add_lorax_adapter(model, 4, adapter_name="y", target_modules=["v_proj"])


def test_a_failure_leaves_the_model_as_it_was() -> None:
    base = adapter_makers.llama()
    before = lorax_makers.run(base)
    down = base.model.layers[1].mlp.down_proj
    kept = down.weight.detach().clone()
    with torch.no_grad():
        down.weight.zero_()
    with pytest.raises(AdapterError, match=r"layers\.1\.mlp\.down_proj is zero"):
        add_lorax_adapter(base, 4)
    assert type(down) is type(base.model.layers[1].mlp.down_proj) is torch.nn.Linear
    with torch.no_grad():
        down.weight.copy_(kept)
    assert torch.equal(lorax_makers.run(base), before)
    model = add_lorax_adapter(base, 4)
    with torch.no_grad():
        down.weight.zero_()
    with pytest.raises(AdapterError, match="is zero"):
        add_lorax_adapter(model, 4, adapter_name="second")
    assert list(model.peft_config) == ["default"]
    assert not lorax_layers(model, "second")


def test_a_merged_layer_a_quantised_one_and_groups_are_refused() -> None:
    model = lorax_makers.adapted("llama")
    model.merge_adapter()
    with pytest.raises(AdapterError, match="unmerge_adapter"):
        add_lorax_adapter(model, 4, adapter_name="second")
    grouped = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(AdapterError, match="2 groups"):
        peft.get_peft_model(grouped, LoraXConfig(r=2, target_modules=["0"]))
    quantised = torch.nn.Sequential(torch.nn.Linear(4, 4))
    quantised[0].weight = torch.nn.Parameter(torch.ones(4, 4, dtype=torch.int8), False)
    with pytest.raises(AdapterError, match="without quantisation"):
        peft.get_peft_model(quantised, LoraXConfig(r=2, target_modules=["0"]))
    with pytest.raises(AdapterError, match="another name"):
        add_lorax_adapter(lorax_makers.adapted("llama"), 4)
