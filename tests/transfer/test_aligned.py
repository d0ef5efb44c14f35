# SPDX-License-Identifier: Apache-2.0
"""Method aligned: models of another depth, and of another width, whose true maps are known."""

import copy

import pytest
import torch
import transformers
from adapter_makers import convnet, llama
from pairs import make_pair, perturb, updates

import lorax_transfer
from lorax_transfer.errors import MatchError

# float32 weights and factors; the maps are found in float64.
CLOSE = 1e-4


def deep_llama(layers, seed=0, **config):
    settings = llama().config
    settings.num_hidden_layers = layers
    for name, value in config.items():
        setattr(settings, name, value)
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(settings).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(0.5 + torch.rand(parameter.shape))
    return model


def with_layers(model, order, seed=9):
    """A model of the layers of another; None stands for a new one."""
    new = deep_llama(len(order), seed=seed)
    new.model.embed_tokens = copy.deepcopy(model.model.embed_tokens)
    new.lm_head = copy.deepcopy(model.lm_head)
    for j, i in enumerate(order):
        if i is not None:
            new.model.layers[j] = copy.deepcopy(model.model.layers[i])
    return new


def moved(pair, tmp_path, **options):
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", method="aligned", **options
    )
    return (
        report,
        updates(pair.source_model, pair.adapter),
        updates(pair.target_model, tmp_path / "out"),
    )


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


DEPTHS = {"pruned": (6, [0, 2, 3, 5]), "deeper": (3, [0, None, 1, None, 2]), "same": (3, [0, 1, 2])}


@pytest.mark.parametrize(("layers", "order"), DEPTHS.values(), ids=DEPTHS)
def test_layers_find_their_own_in_a_model_of_another_depth(tmp_path, layers, order):
    source = deep_llama(layers)
    target = with_layers(source, order)
    perturb(target, 0.2)
    pair = make_pair(tmp_path, lambda: source, target=target, target_modules="all-linear")
    report, before, after = moved(pair, tmp_path)
    wanted = {
        f"model.layers.{j}.{rest}": f"model.layers.{i}.{rest}"
        for j, i in enumerate(order)
        if i is not None
        for rest in {name.split(".", 3)[3] for name in before}
    }
    assert after.keys() == wanted.keys()
    for module, origin in wanted.items():
        weights = [
            model.get_submodule(name).weight.detach()
            for model, name in ((source, origin), (target, module))
        ]
        size = float(weights[1].norm() / weights[0].norm())
        assert relative(after[module], size * before[origin]) < CLOSE
    facts = report.alignment
    assert (facts.source_layers, facts.target_layers) == (layers, len(order))
    assert facts.paired == sum(i is not None for i in order)
    assert facts.stream == "identity"
    # Weights that drifted by a fifth: 1 / sqrt(1 + 0.2^2).
    assert facts.likeness == pytest.approx(0.98, abs=0.03)
    assert report.recommendation.verdict == ("align" if layers != len(order) else "restore")
    lost = [x for x in report.layers if x.status == "excluded"]
    assert {x.module for x in lost} == before.keys() - set(wanted.values())
    assert all("no layer of the target stands for" in x.reason for x in lost)
    by_module = {x.module: x for x in report.layers}
    for module, origin in wanted.items():
        assert by_module[origin].target_tensor == f"{module}.weight"
        assert by_module[origin].outcomes["aligned"].norm_ratio == pytest.approx(1, abs=0.1)


def semi_orthogonal(q, p, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(q, p, generator=generator)).Q


def widened(source, order):
    """The source in the coordinates of a wider model, inside of its blocks too, and the maps."""
    wide = deep_llama(len(order), hidden_size=40, intermediate_size=64, head_dim=10)
    P, H = semi_orthogonal(40, 32, 0), semi_orthogonal(64, 48, 1)
    inner = {"gate": H, "up": H, "down": H}
    for seed, (name, sides) in enumerate({"q": (40, 32), "k": (20, 16), "v": (20, 16)}.items(), 2):
        inner[name] = semi_orthogonal(*sides, seed)
    inner["o"] = semi_orthogonal(40, 32, 5)
    maps = {}
    with torch.no_grad():
        wide.model.embed_tokens.weight.copy_(source.model.embed_tokens.weight @ P.T)
        for j, i in enumerate(order):
            old, new = source.model.layers[i], wide.model.layers[j]
            for block in ("self_attn", "mlp"):
                norm = "input_layernorm" if block == "self_attn" else "post_attention_layernorm"
                g_s, g_t = (getattr(layer, norm).weight.detach().clone() for layer in (old, new))
                for name, layer in getattr(old, block).named_children():
                    if not isinstance(layer, torch.nn.Linear):
                        continue
                    R = inner[name.removesuffix("_proj")]
                    if name in ("o_proj", "down_proj"):
                        left, right = P, R
                    else:
                        left, right = R, g_t.reciprocal()[:, None] * P * g_s
                    getattr(getattr(new, block), name).weight.copy_(left @ layer.weight @ right.T)
                    maps[f"model.layers.{j}.{block}.{name}"] = (
                        f"model.layers.{i}.{block}.{name}",
                        left,
                        right,
                    )
    return wide, maps


def well_conditioned(model):
    """Directions that a weight hardly has are told by rounding alone; give it none."""
    with torch.no_grad():
        for module in model.model.layers.modules():
            if isinstance(module, torch.nn.Linear):
                U, S, Vh = torch.linalg.svd(module.weight, full_matrices=False)
                module.weight.copy_(U * torch.linspace(1, 0.5, len(S)) @ Vh)
    return model


def test_an_update_comes_out_in_the_coordinates_of_a_wider_model(tmp_path):
    """Embeddings tell the stream's map, weights the maps inside of blocks and the depth."""
    source = well_conditioned(deep_llama(4))
    target, maps = widened(source, [0, 1, 3])
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    modules += ["embed_tokens"]
    pair = make_pair(tmp_path, lambda: source, target=target, target_modules=modules)
    # PEFT saves the embeddings whole as well.
    report, before, after = moved(pair, tmp_path, drop=["modules_to_save"])
    P = semi_orthogonal(40, 32, 0).double()
    table = "model.embed_tokens"
    assert relative(after.pop(table), before[table] @ P.T) < CLOSE
    assert after.keys() == maps.keys()
    for module, (origin, left, right) in maps.items():
        want = left.double() @ before[origin] @ right.T.double()
        assert relative(after[module], want) < CLOSE
    assert not any(x.is_validated for x in report.layers if x.status == "transferred")
    assert report.recommendation.verdict == "do not"


def test_modules_outside_of_the_layers_keep_their_place(tmp_path):
    source = deep_llama(3)
    target = with_layers(source, [0, 2])
    pair = make_pair(tmp_path, lambda: source, target=target, target_modules=["q_proj", "lm_head"])
    # PEFT saves a targeted output layer whole as well.
    _, before, after = moved(pair, tmp_path, drop=["modules_to_save"])
    assert after.keys() == {
        "lm_head",
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
    }
    assert relative(after["lm_head"], before["lm_head"]) < CLOSE


def test_a_plan_says_where_each_layer_goes(tmp_path):
    source = deep_llama(3)
    pair = make_pair(
        tmp_path, lambda: source, target=with_layers(source, [0, 2]), target_modules=["q_proj"]
    )
    report = lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, method="aligned", dry_run=True
    )
    reasons = [x.reason for x in report.layers]
    assert reasons == [
        "",
        "no layer of the target stands for this one",
        "goes to model.layers.1.self_attn.q_proj",
    ]


def test_an_adapter_of_some_layers_is_placed_among_all(tmp_path):
    source = deep_llama(5)
    pair = make_pair(
        tmp_path,
        lambda: source,
        target=with_layers(source, [1, 3, 4]),
        target_modules=["q_proj"],
        layers_to_transform=[3],
    )
    _, before, after = moved(pair, tmp_path)
    assert list(after) == ["model.layers.1.self_attn.q_proj"]
    assert relative(*after.values(), *before.values()) < CLOSE


def test_a_copy_to_a_deeper_model_names_its_modules(tmp_path):
    """By its pattern, PEFT would expect factors in the target's third layer as well."""
    source = deep_llama(2)
    target = with_layers(source, [0, 1, None])
    pair = make_pair(tmp_path, lambda: source, target=target, target_modules=["q_proj"])
    lorax_transfer.transfer(
        pair.adapter, pair.source, pair.target, tmp_path / "out", method="copy", rank=8
    )
    written = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert list(updates(target, tmp_path / "out")) == written


class TestRefusals:
    def refuse(self, pair, tmp_path, match):
        with pytest.raises(MatchError, match=match):
            lorax_transfer.transfer(
                pair.adapter, pair.source, pair.target, tmp_path / "out", method="aligned"
            )
        assert not (tmp_path / "out").exists()

    def test_another_tokenizer(self, tmp_path):
        target = deep_llama(2, vocab_size=80)
        pair = make_pair(tmp_path, llama, target=target, target_modules=["q_proj"])
        self.refuse(pair, tmp_path, "64 and 80 tokens, expected models that share a tokenizer")

    def test_convolutions(self, tmp_path):
        pair = make_pair(tmp_path, convnet, target_modules=["conv"], r=2)
        self.refuse(pair, tmp_path, "is for linear layers")

    def test_no_layers(self, tmp_path):
        pair = make_pair(tmp_path, convnet, target_modules=["head"], r=2)
        self.refuse(pair, tmp_path, "one stack of layers, the adapter's are in none")
