# SPDX-License-Identifier: Apache-2.0
"""The language measurement's own models, training and scores, on a few thousand numbers."""

import pytest
import torch
from tiny_language import NAMES, SHAPE, ids, logits, make, train

from benchmarks.quality import lm_data, lm_eval, lm_methods, lm_model, lm_prune, lm_shapes, lm_train


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


@torch.no_grad()
def test_logits_are_those_of_transformers(weights, reference):
    # Two float32 implementations of three layers whose logits are of size 10.
    torch.testing.assert_close(
        logits(SHAPE, weights, ids()), reference(ids()).logits, rtol=1e-5, atol=5e-5
    )


def test_greedy_answers_are_those_of_transformers(weights, reference, examples):
    some = examples.take(6)
    found = lm_eval.Evaluator(SHAPE, weights).answers(some, 20)
    for row, start, answer in zip(some.tokens, some.starts, found, strict=True):
        prompt = torch.from_numpy(row[:start])[None]
        whole = reference.generate(
            prompt, max_new_tokens=20, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        expected = whole[0, start:].tolist()
        assert answer == (expected[: expected.index(2)] if 2 in expected else expected)


def test_longer_prompts_and_ended_rows_do_not_change_an_answer(weights, examples):
    """Side by side with others, each prompt is answered as it is alone, for whatever is loaded."""
    evaluator = lm_eval.Evaluator(SHAPE, weights)
    g = torch.Generator().manual_seed(0)
    for scale in (0.0, 0.2):
        other = {
            n: w + scale * w.std() * torch.randn(w.shape, generator=g) if w.dim() == 2 else w
            for n, w in weights.items()
        }
        evaluator.load(other)
        together = evaluator.answers(examples, 24)
        assert len({len(answer) for answer in together}) > 3
        for i in range(0, len(examples), 12):
            one = lm_data.Examples([examples.tokens[i]], examples.starts[i : i + 1])
            assert lm_eval.Evaluator(SHAPE, other).answers(one, 24) == [together[i]]


FORMS = ["lora", ("full", 0.0), ("diagonal", 0.5), ("banded", 0.0)]


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
    name, form = NAMES[0], make(("full", 0.0), weights)
    module = torch.nn.Sequential(torch.nn.Linear(SHAPE.hidden, SHAPE.hidden, bias=False))
    with torch.no_grad():
        module[0].weight.copy_(weights[f"{name}.weight"])
    model = peft.add_lorax_adapter(module, 8, core="full", target_modules=["0"])
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
    maps = lm_shapes.find_maps(source, target)
    assert maps.layers == kept
    assert maps.reversed(SHAPE.layers).layers == [
        kept.index(i) if i in kept else None for i in range(SHAPE.layers)
    ]
