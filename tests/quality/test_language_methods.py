# SPDX-License-Identifier: Apache-2.0
"""Methods as the language measurement makes them, on random models of a few thousand numbers."""

import dataclasses
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_language import NAMES, SHAPE, ids, make, train

import lorax_kernels as lk
import lorax_transfer
from benchmarks.quality import (
    lm_adapters,
    lm_embeddings,
    lm_eval,
    lm_methods,
    lm_model,
    lm_prune,
    lm_shapes,
)


def test_a_rotated_model_is_carried_without_loss(weights, examples):
    """A target that is the source in another stream's coordinates, three channels wider."""
    g = torch.Generator().manual_seed(0)
    wider = SHAPE.hidden + 3
    Q = torch.linalg.qr(torch.randn(wider, SHAPE.hidden, generator=g)).Q
    gain = torch.full((wider,), (SHAPE.hidden / wider) ** 0.5)
    writers = ("o_proj.weight", "down_proj.weight")
    other = {
        n: Q @ w if n.endswith(writers) else w @ Q.mT for n, w in weights.items() if w.dim() == 2
    }
    other |= {n: gain.clone() for n, w in weights.items() if w.dim() == 1}
    source = lm_methods.Model("source", SHAPE, weights)
    target = lm_methods.Model("narrow", dataclasses.replace(SHAPE, hidden=wider), other)
    adapter = train(weights, make("lora", weights), examples, [0], [2e-2])[0][0]
    maps = lm_shapes.find_maps(source, target)
    assert maps.layers == list(range(SHAPE.layers))
    pair = lm_methods.Pair(source, target)
    moved = lm_shapes.aligned(pair, adapter, maps=maps, sized=False)
    losses = []
    for model, factors in ((source, adapter.factors), (target, moved)):
        evaluator = lm_eval.Evaluator(model.shape, model.weights)
        losses.append(evaluator.answer_loss(examples, 12))
        evaluator.load(factors=factors)
        losses.append(evaluator.answer_loss(examples, 12))
    # Directions of the square o_proj with singular values below 1e-3 of the largest are not told.
    assert losses[2:] == pytest.approx(losses[:2], abs=1e-2)
    assert losses[1] < losses[0] - 0.02
    again = lm_shapes.aligned(
        lm_methods.Pair(target, source),
        lm_adapters.Adapter("lora", moved, {}, 0),
        maps=maps.reversed(SHAPE.layers),
        sized=False,
    )
    for name in (n for n in NAMES if not n.endswith("o_proj")):
        torch.testing.assert_close(
            torch.mm(*again[name]), torch.mm(*adapter.factors[name]), rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize("other", ["shallow", "narrow"])
def test_files_move_as_tensors_do(weights, examples, tmp_path, other):
    if other == "shallow":
        shape, pruned, _ = lm_prune.prune_depth(SHAPE, weights, ids(), 1)
    else:
        shape, pruned = lm_prune.prune_width(SHAPE, weights, ids(), 40, 64)
    models = {
        "source": lm_methods.Model("source", SHAPE, weights),
        other: lm_methods.Model(other, shape, pruned),
    }
    for name, model in models.items():
        save_file(model.weights, tmp_path / f"{name}.safetensors")
    adapter = train(weights, make("lora", weights), examples, [0], [2e-2], steps=2)[0][0]
    tensors = {}
    for name, (B, A) in adapter.factors.items():
        tensors[f"base_model.model.{name}.lora_B.weight"] = B.contiguous()
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    kinds = sorted({name.rpartition(".")[2] for name in NAMES})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": kinds}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    places = [tmp_path / f"{name}.safetensors" for name in models]
    lorax_transfer.transfer(
        tmp_path / "adapter", *places, tmp_path / "moved", method="aligned", device="cpu"
    )
    found = load_file(tmp_path / "moved" / "adapter_model.safetensors")
    pair = lm_methods.Pair(*models.values())
    maps = lm_shapes.find_maps(*models.values())
    expected = lm_shapes.aligned(pair, adapter, maps=maps)
    assert len(found) == 2 * len(expected)
    for name, (B, A) in expected.items():
        prefix = f"base_model.model.{name}"
        moved = found[f"{prefix}.lora_B.weight"] @ found[f"{prefix}.lora_A.weight"]
        # The same maps of float32 weights, on two ways.
        assert (moved - B @ A).norm() <= 1e-4 * (B @ A).norm(), name


@pytest.mark.parametrize("kind", ["lora", "lorax"])
def test_every_method_keeps_shapes_and_copy_is_the_adapter(weights, examples, kind):
    form = make("lora" if kind == "lora" else ("full", 0.0), weights)
    adapter = train(weights, form, examples, [0], [1e-2], steps=2)[0][0]
    g = torch.Generator().manual_seed(0)
    other = {n: w + 0.01 * w.std() * torch.randn(w.shape, generator=g) for n, w in weights.items()}
    pair = lm_methods.Pair(
        lm_methods.Model("source", SHAPE, weights), lm_methods.Model("target", SHAPE, other)
    )
    methods = lm_methods.same_shape(kind, ranks=(8, 16)) | lm_methods.measured(kind, (8, 16))
    methods |= lm_methods.controls()
    for name, move in methods.items():
        moved = move(pair, adapter)
        assert moved.keys() - {lm_embeddings.INPUT, lm_embeddings.OUTPUT} == adapter.factors.keys()
        for layer, (B, A) in moved.items():
            tied = layer.replace(lm_embeddings.OUTPUT, lm_embeddings.INPUT)
            assert (B @ A).shape == weights[f"{tied}.weight"].shape
            if name == "copy":
                torch.testing.assert_close(B @ A, torch.mm(*adapter.factors[layer]))


@pytest.mark.parametrize("strength", [0.3, 1.0, None], ids=["some", "all", "as the tool"])
def test_directions_found_once_are_what_the_library_takes_back(weights, examples, strength):
    g = torch.Generator().manual_seed(0)
    other = {n: w + 0.02 * w.std() * torch.randn(w.shape, generator=g) for n, w in weights.items()}
    pair = lm_methods.Pair(
        lm_methods.Model("source", SHAPE, weights), lm_methods.Model("target", SHAPE, other)
    )
    form = make("lora", weights)
    for adapter in train(weights, form, examples, [0, 1], [1e-2, 1e-2], steps=2)[0]:
        known = pair.saved
        moved = lm_methods.restore(pair, adapter, directions=5, strength=strength)
        for name in NAMES:
            B, A = adapter.factors[name]
            W_s, W_t = weights[f"{name}.weight"], other[f"{name}.weight"]
            # All that the adapter is not on moved about as far: half at the least, of 2 %.
            w = 0.5 if strength is None else strength
            b, a = lk.restore_lora(B, A, W_s, W_t, directions=5, strength=w)
            # Which of nearly equal directions are found depends on the batch (`lk.restore_lora`):
            # the energy that is taken back does not.
            for found in (moved[name][0] @ moved[name][1], b @ a):
                left = W_t - W_s + found - B @ A
                taken = (W_t - W_s).square().sum() - left.square().sum()
                best = torch.linalg.svdvals(W_t - W_s)[:5].square().sum() * (2 * w - w * w)
                assert taken == pytest.approx(float(best), rel=2e-2)
    assert pair.saved > known


def test_embeddings_are_given_back_on_the_side_that_is_named(weights):
    g = torch.Generator().manual_seed(0)
    E = weights[lm_model.EMBEDDING]
    shared = torch.randn(SHAPE.hidden, generator=g)
    D = shared + 0.01 * torch.randn(E.shape, generator=g)
    D[:5] += torch.randn(5, SHAPE.hidden, generator=g)  # what the target was taught
    target = weights | {lm_model.EMBEDDING: E + D}
    pair = lm_methods.Pair(
        lm_methods.Model("source", SHAPE, weights), lm_methods.Model("target", SHAPE, target)
    )
    zero = {n: (torch.zeros(len(weights[f"{n}.weight"]), 1), torch.zeros(1, 1)) for n in NAMES}
    adapter = lm_adapters.Adapter("lora", zero, {}, 0)
    evaluator = lm_eval.Evaluator(SHAPE, target)

    def loaded(part, **options):
        moved = lm_embeddings.beside(
            pair, adapter, layers=lambda pair, adapter: {}, part=part, **options
        )
        evaluator.load(target, moved)
        return [evaluator.weights[n] for n in (lm_model.EMBEDDING, lm_model.HEAD)]

    # Sums of numbers of size 1, in another order.
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-5)
    for side, (at_input, at_output) in (
        (lm_embeddings.INPUT, (E, E + D)),
        (lm_embeddings.OUTPUT, (E + D, E)),
    ):
        found = loaded(lm_embeddings.whole, sides=(side,))
        close(found[0], at_input)
        close(found[1], at_output)
    half, _ = loaded(lm_embeddings.whole, strength=0.5)
    close(half, E + D / 2)
    one, _ = loaded(partial(lm_embeddings.leading, directions=1))
    # One direction holds what all rows have in common, but for the five.
    assert (one - E)[5:].norm() < 0.2 * D[5:].norm()
    kept, _ = loaded(partial(lm_embeddings.untaught, share=0.9))
    close(kept[:5], (E + D)[:5])
    assert int(((kept - E).abs().max(1).values < 1e-5).sum()) == round(0.9 * SHAPE.vocab)
    moved, _ = loaded(partial(lm_embeddings.rows, count=5))
    assert int(((moved - E).abs().max(1).values < 1e-5).sum()) == 5
    evaluator.load(target)
    close(evaluator.weights[lm_model.HEAD], E + D)
