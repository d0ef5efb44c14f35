# SPDX-License-Identifier: Apache-2.0
"""The doors into the installed PEFT: what it returns with the switch on and off.

Ranks are far below the sides and spectra are random, so that the cut is determined and the
tolerance of a truncated SVD is the only difference. `1e-3` below is that tolerance.
"""

import contextlib

import peft
import pytest
import torch
from compat_models import EVERYTHING, LINEAR, Net, lora_layers, randomise, two_adapters, updates

from lorax_kernels import compat
from lorax_kernels.compat import _pissa

TOL = 1e-3


def close(found, expected, tolerance):
    found, expected = found.detach().float(), expected.detach().float()
    scale = float(torch.linalg.vector_norm(expected))
    error = float(torch.linalg.vector_norm(found - expected))
    assert error <= tolerance * scale, f"{error / scale:.1e}"


def pissa(init, dtype=torch.float32, targets=LINEAR, **config):
    config = {"r": 4, "lora_alpha": 8, "init_lora_weights": init, **config}
    return peft.get_peft_model(Net(dtype), peft.LoraConfig(target_modules=targets, **config))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4"])
def test_pissa(init, dtype):
    exact = pissa("pissa", dtype)
    with compat.enable("peft"):
        ours = pissa(init, dtype)
    rounding = torch.finfo(dtype).eps
    for name, layer in lora_layers(exact).items():
        got = lora_layers(ours)[name]
        for part in ("lora_A", "lora_B"):
            one, other = (getattr(x, part)["default"].weight for x in (layer, got))
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.requires_grad == other.requires_grad
        # An error of TOL in the projector moves the principal part, and the rest, by TOL times it.
        close(
            got.get_delta_weight("default"), layer.get_delta_weight("default"), TOL + 2 * rounding
        )
        close(got.base_layer.weight, layer.base_layer.weight, TOL + 2 * rounding)
        base = dict(Net(dtype).named_modules())[name.rpartition("model.")[2]].weight
        whole = got.base_layer.weight.float() + got.get_delta_weight("default").float()
        close(whole, base, 1e-6 + 2 * rounding)


def test_pissa_is_closer_to_the_exact_one_than_four_iterations():
    exact, fast = pissa("pissa"), pissa("pissa_niter_4")
    with compat.enable("peft"):
        ours = pissa("pissa_niter_4")

    def miss(model):
        pairs = zip(
            updates(model, "default").values(), updates(exact, "default").values(), strict=True
        )
        return sum(float(torch.linalg.norm(x - y)) for x, y in pairs)

    assert miss(ours) < miss(fast) / 3


def test_pissa_by_iteration(monkeypatch):
    """A layer large enough not to be decomposed exactly, with the flat spectrum of noise."""
    paths = []
    solve = _pissa.truncated_svd

    def noted(W, *args, **kwargs):
        found = solve(W, *args, **kwargs)
        paths.extend(svd.path for svd in found)
        return found

    def build():
        torch.manual_seed(5)
        net = torch.nn.Sequential(torch.nn.Linear(320, 480))
        config = peft.LoraConfig(r=6, target_modules=["0"], init_lora_weights="pissa")
        return peft.get_peft_model(net, config)

    (exact,) = lora_layers(build()).values()
    monkeypatch.setattr(_pissa, "truncated_svd", noted)
    with compat.enable("peft"):
        (ours,) = lora_layers(build()).values()
    assert paths == ["randomized"]
    close(ours.get_delta_weight("default"), exact.get_delta_weight("default"), 2 * TOL)
    close(ours.base_layer.weight, exact.base_layer.weight, TOL)


def test_pissa_niter_is_content_with_ten_times_the_tolerance(monkeypatch):
    asked = []
    solve = _pissa.truncated_svd

    def noted(W, rank, *, tol, **kwargs):
        asked.append(tol)
        return solve(W, rank, tol=tol, **kwargs)

    monkeypatch.setattr(_pissa, "truncated_svd", noted)
    for init, tol in (("pissa", 1e-3), ("pissa_niter_16", 1e-2)):
        with compat.enable("peft"):
            pissa(init)
        assert set(asked) == {tol}
        asked.clear()
    with compat.enable("peft", tol=1e-5):
        pissa("pissa_niter_16")
    assert set(asked) == {1e-4}


@pytest.mark.parametrize(("init", "draws"), [("pissa", False), (True, True), ("gaussian", True)])
def test_random_numbers_that_nobody_sees_are_not_drawn(init, draws):
    net = Net()
    config = peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=init)
    before = torch.get_rng_state()
    with compat.enable("peft"):
        model = peft.get_peft_model(net, config)
    assert torch.equal(before, torch.get_rng_state()) != draws
    for layer in lora_layers(model).values():
        assert torch.linalg.norm(layer.lora_A["default"].weight) > 0


def test_other_linear_layers_are_filled_as_ever():
    torch.manual_seed(3)
    plain = torch.nn.Linear(5, 4)
    with compat.enable("peft"):
        pissa("pissa")
        torch.manual_seed(3)
        found = torch.nn.Linear(5, 4)
    assert torch.equal(found.weight, plain.weight)
    assert torch.equal(found.bias, plain.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_pissa_leaves_parameters_as_peft_does(dtype):
    """Names, shapes, dtypes and gradients, with what PEFT would do to factors afterwards."""
    models = []
    for is_on in (False, True):
        config = peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa")
        handle = compat.enable("peft") if is_on else contextlib.nullcontext()
        with handle:
            models.append(peft.get_peft_model(Net(dtype), config, autocast_adapter_dtype=False))
    exact, ours = (
        {n: (p.shape, p.dtype, p.requires_grad, p.stride()) for n, p in model.named_parameters()}
        for model in models
    )
    assert ours == exact
    storages = [p.untyped_storage().data_ptr() for p in models[1].parameters()]
    assert len(set(storages)) == len(storages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_pissa_takes_out_what_the_layer_adds_back(dtype):
    """Factors are rounded to the weight's dtype, but not twice: the rest knows of it."""
    with compat.enable("peft"):
        model = pissa("pissa", dtype)
    plain = dict(Net(dtype).named_modules())
    for name, layer in lora_layers(model).items():
        weight = plain[name.rpartition("model.")[2]].weight.double()
        B, A = (getattr(layer, f)["default"].weight.double() for f in ("lora_B", "lora_A"))
        rest = layer.base_layer.weight.double()
        off = (rest + layer.scaling["default"] * (B @ A) - weight).abs()
        # One rounding to nearest of the rest, and float32's of the product.
        half = torch.finfo(dtype).eps / 2
        assert bool((off <= half * rest.abs() + 1e-6 * weight.abs().max()).all())


def test_pissa_of_a_layer_on_its_own_is_float32_as_in_peft():
    model = peft.get_peft_model(
        Net(torch.bfloat16), peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights=False)
    )
    with compat.enable("peft"):
        layer = next(iter(lora_layers(model).values()))
        layer.pissa_init("default", "pissa")
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.linalg.norm(layer.lora_B["default"].weight) > 0


def test_pissa_of_a_conv1d():
    exact = pissa("pissa", targets=["conv1d"], fan_in_fan_out=True)
    with compat.enable("peft"):
        ours = pissa("pissa", targets=["conv1d"], fan_in_fan_out=True)
    (got,), (layer,) = lora_layers(ours).values(), lora_layers(exact).values()
    close(got.get_delta_weight("default"), layer.get_delta_weight("default"), TOL)
    close(got.base_layer.weight, layer.base_layer.weight, TOL)


def test_pissa_under_dora_sees_the_factors_it_normalises():
    exact = pissa("pissa", use_dora=True)
    with compat.enable("peft"):
        ours = pissa("pissa", use_dora=True)
    for name, layer in lora_layers(exact).items():
        got = lora_layers(ours)[name].lora_magnitude_vector["default"].weight
        close(got, layer.lora_magnitude_vector["default"].weight, TOL)


def test_pissa_with_ranks_of_its_own():
    with compat.enable("peft"):
        ours = pissa("pissa", rank_pattern={"fc2": 7}, lora_alpha=4)
    exact = pissa("pissa", rank_pattern={"fc2": 7}, lora_alpha=4)
    for name, update in updates(exact, "default").items():
        close(updates(ours, "default")[name], update, TOL)
    assert lora_layers(ours)["base_model.model.fc2"].lora_A["default"].weight.shape == (7, 24)


def test_pissa_of_a_shared_weight_takes_it_apart_twice():
    def build():
        net = Net()
        net.fc2.weight = net.fc1.weight
        config = peft.LoraConfig(r=4, target_modules=LINEAR, init_lora_weights="pissa")
        return peft.get_peft_model(net, config)

    exact = build()
    with compat.enable("peft"):
        ours = build()
    for name, layer in lora_layers(exact).items():
        got = lora_layers(ours)[name]
        close(got.base_layer.weight, layer.base_layer.weight, 2 * TOL)
        close(got.get_delta_weight("default"), layer.get_delta_weight("default"), 2 * TOL)


def test_pissa_decomposes_equal_shapes_together(monkeypatch):
    calls = []
    solve = _pissa.truncated_svd

    def counted(W, *args, **kwargs):
        calls.append(len(W))
        return solve(W, *args, **kwargs)

    monkeypatch.setattr(_pissa, "truncated_svd", counted)
    with compat.enable("peft"):
        pissa("pissa")
    assert calls == [3]


@pytest.mark.parametrize("init", ["pissa_niter_x", "pissa_4"])
def test_pissa_leaves_errors_to_peft(init):
    with compat.enable("peft"), pytest.raises(ValueError, match=r"pissa|invalid literal"):
        pissa(init)


def test_pissa_leaves_a_rank_that_does_not_fit_to_peft():
    exact = pissa("pissa", r=30)
    with compat.enable("peft"):
        ours = pissa("pissa", r=30)
    for name, update in updates(exact, "default").items():
        assert torch.equal(updates(ours, "default")[name], update)


@pytest.mark.parametrize("rank", [None, 2, 12], ids=["largest", "less", "more than there is"])
@pytest.mark.parametrize("kind", ["svd", "ties_svd", "magnitude_prune_svd"])
def test_add_weighted_adapter(kind, rank):
    results = []
    for is_on in (False, True):
        model = two_adapters(EVERYTHING)
        options = {"svd_rank": rank, "combination_type": kind}
        if kind != "svd":
            options["density"] = 0.6
        with compat.enable("peft") if is_on else torch.no_grad():
            model.add_weighted_adapter(["one", "two"], [0.7, -0.4], "sum", **options)
        results.append(model)
    expected, found = (updates(model, "sum") for model in results)
    for name, update in expected.items():
        # The factored path is exact; pruning leaves a full-rank matrix and TOL.
        close(found[name], update, 2e-6 if kind == "svd" else TOL)
        for one, other in zip(*(_factors(m, name) for m in results), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def _factors(model, name):
    layer = lora_layers(model)[name]
    if "sum" in layer.lora_A:
        return layer.lora_A["sum"].weight, layer.lora_B["sum"].weight
    return layer.lora_embedding_A["sum"], layer.lora_embedding_B["sum"]


@pytest.mark.parametrize("kind", ["dare_linear_svd", "dare_ties_svd"])
def test_add_weighted_adapter_draws_what_the_original_draws(kind):
    results = []
    for is_on in (False, True):
        model = two_adapters(LINEAR)
        torch.manual_seed(11)
        with compat.enable("peft") if is_on else torch.no_grad():
            model.add_weighted_adapter(
                ["one", "two"], [1.0, 0.5], "sum", combination_type=kind, density=0.5
            )
        results.append(updates(model, "sum"))
    for name, update in results[0].items():
        close(results[1][name], update, TOL)


def test_add_weighted_adapter_on_a_bf16_model_stays_in_float32():
    results = []
    for is_on in (False, True):
        model = two_adapters(LINEAR, torch.bfloat16)
        with compat.enable("peft") if is_on else torch.no_grad():
            model.add_weighted_adapter(["one", "two"], [1, 1], "sum", combination_type="svd")
        results.append(model)
    for name, update in updates(results[0], "sum").items():
        close(updates(results[1], "sum")[name], update, 2e-6)
        assert _factors(results[1], name)[0].dtype == torch.float32


def test_add_weighted_adapter_takes_what_the_original_cannot():
    """Adapters in bfloat16, of which LAPACK computes no SVD."""
    model = two_adapters(LINEAR).to(torch.bfloat16)
    exact = {
        name: layer.get_delta_weight("one").float() + layer.get_delta_weight("two").float()
        for name, layer in lora_layers(model).items()
    }
    options = {"combination_type": "svd", "svd_rank": 8}
    with compat.enable("peft"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum", **options)
    for name, update in updates(model, "sum").items():
        # Three updates of one magnitude, each rounded to bfloat16.
        close(update, exact[name], 4 * torch.finfo(torch.bfloat16).eps)


def test_directions_beyond_the_adapters_can_still_be_trained():
    model = two_adapters(["fc1"])
    with compat.enable("peft"):
        model.add_weighted_adapter(
            ["one", "two"], [1, 1], "sum", combination_type="svd", svd_rank=12
        )
    A, B = _factors(model, "base_model.model.fc1")
    # Ranks 3 and 5 fill eight rows; the others have no weight but a direction.
    assert bool((B[:, 8:] == 0).all())
    torch.testing.assert_close(A @ A.T, torch.eye(12), rtol=0, atol=1e-5)


def test_add_weighted_adapter_with_a_clamp_is_the_originals():
    results = []
    for is_on in (False, True):
        model = two_adapters(LINEAR)
        with compat.enable("peft") if is_on else torch.no_grad():
            model.add_weighted_adapter(
                ["one", "two"], [1, 1], "sum", combination_type="svd", svd_clamp=0.9
            )
        results.append(updates(model, "sum"))
    for name, update in results[0].items():
        assert torch.equal(results[1][name], update)


def test_add_weighted_adapter_forms_no_delta(monkeypatch):
    model = two_adapters(LINEAR)
    monkeypatch.setattr(torch.linalg, "svd", _small_only(torch.linalg.svd))
    with compat.enable("peft"):
        model.add_weighted_adapter(["one", "two"], [1, 1], "sum", combination_type="svd")


def _small_only(svd):
    def checked(matrix, *args, **kwargs):
        assert max(matrix.shape) <= 8, f"an SVD of {tuple(matrix.shape)}"
        return svd(matrix, *args, **kwargs)

    return checked


@pytest.mark.parametrize("rank", [4, 0.9, 0.99999], ids=["rank", "share", "almost all"])
def test_convert_to_lora(rank):
    def build():
        torch.manual_seed(3)
        model = peft.get_peft_model(
            Net(), peft.LoHaConfig(r=3, target_modules=LINEAR, init_weights=False)
        )
        randomise(model)
        return model

    expected, exact = peft.convert_to_lora(build(), rank)
    with compat.enable("peft"):
        config, found = peft.convert_to_lora(build(), rank)
    assert config.rank_pattern == expected.rank_pattern
    assert found.keys() == exact.keys()
    for name in [key for key in exact if "lora_A" in key]:
        other = name.replace("lora_A", "lora_B")
        assert found[name].shape == exact[name].shape
        close(found[other] @ found[name], exact[other] @ exact[name], TOL)


def test_convert_to_lora_of_a_conv1d(tmp_path):
    def build():
        torch.manual_seed(3)
        config = peft.VBLoRAConfig(
            r=4,
            num_vectors=16,
            vector_length=4,
            topk=2,
            target_modules=["conv1d"],
            fan_in_fan_out=True,
        )
        model = peft.get_peft_model(Net(), config)
        randomise(model)
        return model

    _, exact = peft.convert_to_lora(build(), 2)
    with compat.enable("peft"):
        _, found = peft.convert_to_lora(build(), 2)
    (A,) = [x for key, x in found.items() if "lora_A" in key]
    (B,) = [x for key, x in found.items() if "lora_B" in key]
    (A0,) = [x for key, x in exact.items() if "lora_A" in key]
    (B0,) = [x for key, x in exact.items() if "lora_B" in key]
    assert (A.shape, B.shape) == (A0.shape, B0.shape)
    close(B @ A, B0 @ A0, TOL)


def test_save_as_lora_loads(tmp_path):
    torch.manual_seed(3)
    model = peft.get_peft_model(
        Net(), peft.LoHaConfig(r=1, target_modules=LINEAR, init_weights=False)
    )
    ids = torch.arange(6)[None]
    with compat.enable("peft"):
        peft.save_as_lora(tmp_path / "lora", model, 1)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "lora")
    # A Hadamard product of two rank-1 matrices has rank 1, so that nothing is cut off.
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [0.0, 1.5, 40], ids=str)
def test_convert_leaves_bad_ranks_to_peft(rank):
    model = peft.get_peft_model(Net(), peft.LoHaConfig(r=1, target_modules=LINEAR))
    with compat.enable("peft"), pytest.raises(ValueError, match="rank"):
        peft.convert_to_lora(model, rank)


def test_loftq_decomposition():
    from peft.utils import loftq_utils

    residual = torch.randn(48, 32)
    exact = loftq_utils._low_rank_decomposition(residual, 4)
    with compat.enable("peft"):
        found = loftq_utils._low_rank_decomposition(residual, reduced_rank=4)
    assert found["reduced_rank"] == 4
    assert (found["L"].shape, found["R"].shape) == (exact["L"].shape, exact["R"].shape)
    close(found["L"] @ found["R"], exact["L"] @ exact["R"], TOL)
    with compat.enable("peft"), pytest.raises(ValueError, match="2D"):
        loftq_utils._low_rank_decomposition(torch.ones(2, 2, 2), 1)
