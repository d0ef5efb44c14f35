# SPDX-License-Identifier: Apache-2.0
"""The language measurement's own machinery, on random models of a few thousand numbers."""

import dataclasses
import json
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import lorax_kernels as lk
import lorax_transfer
from benchmarks.quality import (
    lm_adapters,
    lm_data,
    lm_embeddings,
    lm_eval,
    lm_lab,
    lm_measure,
    lm_methods,
    lm_model,
    lm_plot,
    lm_prune,
    lm_report,
    lm_shapes,
    lm_train,
    lm_verdicts,
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory, examples):
    """What `prepare` writes, of made-up words."""
    tokenizers = pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("data")
    words = {f"w{i}": i for i in range(SHAPE.vocab)}
    model = tokenizers.models.WordLevel(words, unk_token="w0")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.save(str(path / "tokenizer.json"))
    arrays, references = {}, {}
    rng = np.random.default_rng(2)
    for task in lm_data.LENGTH:
        for split, first, last in (("train", 0, 64), ("valid", 64, 80), ("test", 80, 96)):
            rows = range(first, last)
            split_rows = [
                (examples.tokens[i][: examples.starts[i]], examples.tokens[i][examples.starts[i] :])
                for i in rows
            ]
            arrays |= lm_data._pack(
                [(p.tolist(), a.tolist(), "") for p, a in split_rows], f"{task}.{split}"
            )
            texts = [" ".join(f"w{t}" for t in a[:-1]) for _, a in split_rows]
            references[f"{task}.{split}"] = texts
    for name in ("spanish", "generic"):
        for split, size in (("train", 40_000), ("valid", 300)):
            arrays[f"{name}.{split}"] = rng.integers(3, SHAPE.vocab, size).astype(np.uint16)
    np.savez(path / "data.npz", **arrays)
    (path / "references.json").write_text(json.dumps(references))
    return path


TINY = dataclasses.replace(
    lm_lab.FULL,
    steps={"enfr": 16, "xsum": 4},
    batch={"enfr": 8, "xsum": 4},
    targets={"near": 2, "mid": 4, "far": 8},
    others={"wiki": 3, "merged": 3},
    target_rate=1e-3,
    target_batch=2,
    heal_steps=3,
    heal_batch=2,
    test=8,
    drop_layers=1,
    width=40,
    ffn=64,
    seeds=(0, 1),
    rates={
        ("lora", "enfr"): [1e-2, 2e-2],
        ("lorax", "enfr"): [2e-2],
        ("lora", "xsum"): [1e-2],
        ("attention", "enfr"): [1e-2],
    },
    core=8,
    ranks=(8, 16),
    train_length={"enfr": 12, "xsum": 12},
    cases=(
        ("lora", "enfr", ("far", "merged")),
        ("lorax", "enfr", ("mid",)),
        ("lora", "xsum", ("mid", "wiki")),
        ("attention", "enfr", ("mid",)),
    ),
    controls=(("lora", "enfr", ("far",)),),
    skill_rows=2,
)


def test_what_is_late_is_left_out(folder, tmp_path, weights, capsys):
    lab = lm_lab.Lab(
        folder, tmp_path / "out.json", device="cpu", scale=TINY, source=(SHAPE, weights), budget=0
    )
    lm_measure.Measurement(lab).run()
    log = capsys.readouterr().out
    assert "late: xsum, wiki, lora is left out" in log
    assert "failed" not in log


def test_measurement_from_training_to_document(folder, tmp_path, weights, capsys, monkeypatch):
    # These texts are short.
    monkeypatch.setattr(lm_lab, "LENGTH", dict.fromkeys(lm_lab.LENGTH, 12))
    monkeypatch.setattr(lm_lab, "ANSWER", dict.fromkeys(lm_lab.ANSWER, 8))
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    pytest.importorskip("matplotlib")
    lab = lm_lab.Lab(
        folder, tmp_path / "out.json", device="cpu", scale=TINY, source=(SHAPE, weights)
    )
    lm_measure.Measurement(lab).run()
    log = capsys.readouterr().out
    assert "failed" not in log
    assert "late" not in log
    lm_report.score(tmp_path / "out.json", lab.corpus.references)
    result = json.loads((tmp_path / "out.json").read_text())
    rows = result["rows"]
    assert all(("bleu" if row["task"] == "enfr" else "rouge_l") in row for row in rows)
    assert {row["target"] for row in rows} == {"source", *lm_report.TARGETS} - {"near"}
    # Anything else would be another model than the source in all but the norms' weights.
    own = lm_report.select(rows, source="source", target="source", task="enfr", adapter="lora")
    undone = lm_report.select(rows, target="far", method="undo all, source's embeddings")
    losses = {row["seed"]: row["nll"] for row in undone if row["adapter"] == "lora"}
    assert losses == pytest.approx({row["seed"]: row["nll"] for row in own}, abs=0.02)
    found = lm_report.cases(result)
    assert len(found) == 6 + 4
    # What a LoRA was merged in for left the embeddings alone: there is nothing to give back.
    merged = next(c for c in found if c.target == "merged")
    assert merged.own == "generic_nll"
    assert not [name for name in merged.methods if "embeddings" in name]
    whole = next(c for c in found if (c.target, c.kind) == ("far", "lora"))
    assert {"restore", "restore --embeddings 0.5", "copy + embeddings q=1"} < whole.methods.keys()
    bases = result["facts"]["source"]["bases_ms"]
    assert bases.keys() == {"8"}
    scans = result["facts"]["mid"]["scan"]
    adapted = {key: scan["0"]["layers"] for key, scan in scans.items()}
    assert adapted == {"lorax enfr": 21, "lora xsum": 21, "attention enfr": 12}
    far = next(c for c in found if (c.target, c.kind) == ("far", "lora"))
    lift, gap = far.shares("trained")
    assert lift == pytest.approx([100, 100])
    assert gap == []
    assert far.shares("copy")[0] == pytest.approx(
        [
            100
            * (far.none["nll"] - far.methods["copy"][s]["nll"])
            / (far.none["nll"] - far.methods["trained"][s]["nll"])
            for s in TINY.seeds
        ]
    )
    document = tmp_path / "quality.md"
    begin, end = lm_report.BEGIN.format("tables"), lm_report.END.format("tables")
    document.write_text(f"before\n{begin}\n{end}\nafter\n")
    lm_report.put(lm_report.tables(result), document, "tables")
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "### English to French: LoRA, source to far, drift" in text
    assert "BLEU" in text
    assert "ROUGE-L" in text
    cut = lm_report.tables(result | {"answers_end_at": 8})
    assert cut.count("\n") == lm_report.tables(result).count("\n")
    for name in lm_report.METRICS.values():
        assert name not in cut
    for plot in (lm_plot.over_drift, lm_plot.over_price):
        plot(result, tmp_path / "plot.png")
        assert (tmp_path / "plot.png").stat().st_size > 10_000
        (tmp_path / "plot.png").unlink()
    lm_verdicts.report([tmp_path / "out.json", tmp_path / "out.json"])
    assert f"of {len(found)} (4 of 4 held out); by loss against" in capsys.readouterr().out
