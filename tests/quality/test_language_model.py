# SPDX-License-Identifier: Apache-2.0
"""The language measurement's own machinery, on random models of a few thousand numbers."""

import numpy as np
import pytest
import torch

import lorax_kernels as lk
from benchmarks.quality import (
    lm_adapters,
    lm_data,
    lm_eval,
    lm_methods,
    lm_model,
    lm_prune,
    lm_train,
)

SHAPE = lm_model.Shape(
    vocab=61, hidden=48, layers=3, heads=6, kv_heads=2, ffn=80, head_dim=8, theta=1e4, eps=1e-5
)
NAMES = SHAPE.module_names()


@pytest.fixture(scope="module")
def weights():
    return lm_model.random_model(SHAPE)


@pytest.fixture(scope="module")
def examples():
    """Rows to be answered by themselves reversed."""
    rng = np.random.default_rng(0)
    tokens, starts = [], []
    for _ in range(96):
        prompt = rng.integers(3, SHAPE.vocab, rng.integers(3, 6))
        tokens.append(np.concatenate([prompt, prompt[::-1], [lm_data.END]]))
        starts.append(len(prompt))
    return lm_data.Examples(tokens, np.array(starts))


@pytest.fixture(scope="module")
def reference(weights):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=SHAPE.vocab,
        hidden_size=SHAPE.hidden,
        num_hidden_layers=SHAPE.layers,
        num_attention_heads=SHAPE.heads,
        num_key_value_heads=SHAPE.kv_heads,
        intermediate_size=SHAPE.ffn,
        head_dim=SHAPE.head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": SHAPE.theta},
        rms_norm_eps=SHAPE.eps,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=lm_data.END,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    model.load_state_dict(weights, strict=False)
    return model


def logits(shape, weights, ids):
    rotary = lm_model.Rotary(shape, ids.shape[1], ids.device, torch.float32)
    attend = lm_model.causal(shape, rotary, ids.shape[1])
    states = lm_model.hidden_states(shape, weights, ids, lm_model.base_linear(weights), attend)
    return states @ lm_model.head(weights).T


def ids(rows=4, length=12):
    return torch.from_numpy(np.random.default_rng(1).integers(3, SHAPE.vocab, (rows, length)))


@torch.no_grad()
def test_logits_are_those_of_transformers(weights, reference):
    # Two float32 implementations of three layers whose logits are of size 10.
    torch.testing.assert_close(
        logits(SHAPE, weights, ids()), reference(ids()).logits, rtol=1e-5, atol=5e-5
    )


def test_greedy_answers_are_those_of_transformers(weights, reference, examples):
    some = examples.take(6)
    found = lm_eval.Evaluator(SHAPE, weights).answers(some, 5)
    for row, start, answer in zip(some.tokens, some.starts, found, strict=True):
        prompt = torch.from_numpy(row[:start])[None]
        whole = reference.generate(
            prompt, max_new_tokens=5, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        expected = whole[0, start:].tolist()
        assert answer == (expected[: expected.index(2)] if 2 in expected else expected)


def make(form, weights):
    if form == "lora":
        return lm_adapters.Lora({n: tuple(weights[f"{n}.weight"].shape) for n in NAMES}, 4)
    core, power = form
    bases = {n: lk.truncated_svd(weights[f"{n}.weight"], 8) for n in NAMES}
    made = lm_adapters.LoraX(bases, core, sigma_power=power, band=2 if core == "banded" else 0)
    return made.prepare(torch.device("cpu"), torch.float32)


FORMS = ["lora", ("full", 0.0), ("diagonal", 0.5), ("banded", 0.0)]


def train(weights, form, examples, seeds, rates, steps=12):
    return lm_train.train_adapters(
        SHAPE, weights, form, examples, length=12, seeds=seeds, rates=rates, steps=steps, batch=8
    )


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f if isinstance(f, str) else f[0])
def test_adapters_learn_and_merge_to_what_was_trained(weights, examples, form):
    adapters, losses, made, _ = train(weights, make(form, weights), examples, [0], [2e-2])
    assert made == 12
    evaluator = lm_eval.Evaluator(SHAPE, weights)
    before = evaluator.answer_loss(examples, 12)
    evaluator.load(factors=adapters[0].factors)
    after = evaluator.answer_loss(examples, 12)
    assert after < before - 0.02
    # The loss in training was that of nearly the same adapter, on other examples.
    assert abs(after - losses[0]) < 0.3 * before
    evaluator.load()
    assert evaluator.answer_loss(examples, 12) == before


def test_adapters_side_by_side_are_those_trained_alone(weights, examples):
    form = make("lora", weights)
    together, _, _, _ = train(weights, form, examples, [0, 1], [1e-2, 3e-3], steps=4)
    alone, _, _, _ = train(weights, form, examples, [1], [3e-3], steps=4)
    for name in NAMES:
        for ours, theirs in zip(together[1].factors[name], alone[0].factors[name], strict=True):
            # Adam divides by the gradient's own size: rounding moves an entry whose gradient is
            # nearly zero by up to a step.
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_update_is_that_of_the_peft_adapter(weights):
    peft = pytest.importorskip("lorax_transfer.peft")
    name, form = NAMES[0], make(("full", 0.5), weights)
    module = torch.nn.Sequential(torch.nn.Linear(SHAPE.hidden, SHAPE.hidden, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(weights[f"{name}.weight"])
    model = peft.add_lorax_adapter(module, 8, core="full", sigma_power=0.5, target_modules=["0"])
    layer = next(iter(peft.lorax_layers(model).values()))
    core = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.lora_core["default"].weight.copy_(core)
    B, A = form.factors(name, {f"{name}.C": core})
    torch.testing.assert_close(B @ A, layer.get_delta_weight("default"), rtol=1e-4, atol=1e-5)


def test_continued_training_drifts_and_a_teacher_pulls_back(weights):
    rows = ids(40 * 4, 12).view(40, 4, 12)
    kept, _, _ = lm_train.train_model(SHAPE, weights, rows, rate=1e-3, snapshots={5, 40})
    drifts = [lm_model.drift(weights, kept[steps], NAMES) for steps in (5, 40)]
    assert 0 < drifts[0] < drifts[1]
    teacher = (SHAPE, weights)
    _, losses, _ = lm_train.train_model(
        SHAPE, kept[40], rows, rate=1e-3, snapshots={1, 40}, teacher=teacher
    )
    assert losses[40] < 0.5 * losses[1]


@torch.no_grad()
def test_rotating_without_cutting_changes_nothing(weights):
    gains = {n: w * 1.3 if w.dim() == 1 else w for n, w in weights.items()}
    shape, rotated = lm_prune.prune_width(SHAPE, gains, ids(), SHAPE.hidden, SHAPE.ffn)
    # The rotation is one of float64 rounded to float32.
    torch.testing.assert_close(
        logits(shape, rotated, ids()), logits(SHAPE, gains, ids()), rtol=1e-4, atol=1e-3
    )


def test_dropped_layers_are_found_again(weights):
    shape, shallow, kept = lm_prune.prune_depth(SHAPE, weights, ids(), 1)
    g = torch.Generator().manual_seed(0)
    healed = {n: w + 0.1 * w.std() * torch.randn(w.shape, generator=g) for n, w in shallow.items()}
    source = lm_methods.Model("source", SHAPE, weights)
    target = lm_methods.Model("shallow", shape, healed)
    assert shape.layers == 2
    assert lm_methods.match_depth(source, target) == kept


@pytest.mark.parametrize("kind", ["lora", "lorax"])
def test_every_method_keeps_shapes_and_copy_is_the_adapter(weights, examples, kind):
    form = make("lora" if kind == "lora" else ("full", 0.0), weights)
    adapter = train(weights, form, examples, [0], [1e-2], steps=2)[0][0]
    g = torch.Generator().manual_seed(0)
    other = {n: w + 0.01 * w.std() * torch.randn(w.shape, generator=g) for n, w in weights.items()}
    pair = lm_methods.Pair(
        lm_methods.Model("source", SHAPE, weights), lm_methods.Model("target", SHAPE, other)
    )
    for name, move in lm_methods.same_shape(kind, ranks=(8, 16)).items():
        moved = move(pair, adapter)
        assert moved.keys() == adapter.factors.keys()
        for layer, (B, A) in moved.items():
            assert (B @ A).shape == weights[f"{layer}.weight"].shape
            if name == "copy":
                torch.testing.assert_close(B @ A, torch.mm(*adapter.factors[layer]))


def test_no_test_sentence_is_trained_on():
    words = np.random.default_rng(0).integers(0, 50, (400, 6))
    pairs = [(" ".join(f"w{w}" for w in row), f"f{i}") for i, row in enumerate(words)]
    again = [(english.upper() + " !", "other") for english, _ in pairs]
    rows = lm_data._translation([*pairs, *again], lambda text: [3] * len(text.split()))
    texts = {split: {french for _, _, french in part} for split, part in rows.items()}
    assert len(texts["train"]) > 300
    assert all(texts[split] for split in ("valid", "test"))
    count = sum(map(len, rows.values()))
    assert count == len({lm_data.normalise_sentence(english) for english, _ in pairs})
