# SPDX-License-Identifier: Apache-2.0
"""The measurement between two sizes, on a random model and a larger one that computes the same."""

import json

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tokenizers", reason="texts are decoded")

from benchmarks.quality import lm_data, lm_methods, sizes, sizes_data, sizes_maps, sizes_pack
from benchmarks.quality import sizes_report as report
from benchmarks.quality.lm_adapters import Adapter
from benchmarks.quality.lm_eval import Evaluator
from benchmarks.quality.lm_model import Rotary, base_linear, causal, head, hidden_states
from benchmarks.quality.sizes_reduced import LARGE, SMALL, larger, random_qwen

LAST = f"model.layers.{SMALL.layers}.mlp.down_proj"


@pytest.fixture(scope="module")
def pair():
    small = random_qwen(SMALL)
    made = larger(SMALL, small, **LARGE)
    return lm_methods.Pair(
        lm_methods.Model("small", SMALL, small), lm_methods.Model("large", *made)
    )


@pytest.fixture(scope="module")
def ids():
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, SMALL.vocab, (40, 12), generator=generator)


@pytest.fixture(scope="module")
def adapter(pair):
    g = torch.Generator().manual_seed(3)
    factors = {}
    for name in SMALL.module_names():
        m, n = pair.source.matrix(name).shape
        B, A = torch.randn(m, 4, generator=g), torch.randn(4, n, generator=g) / n**0.5
        factors[name] = (0.15 * B, A)
    return Adapter("lora", factors, {}, 0)


def logits(model, ids, factors=None):
    weights, shape = model.weights, model.shape
    rotary = Rotary(shape, ids.shape[1], ids.device, torch.float32)
    linear = sizes_maps.linear_of(weights, factors) if factors else base_linear(weights)
    attend = causal(shape, rotary, ids.shape[1])
    return F.linear(hidden_states(shape, weights, ids, linear, attend), head(weights))


@torch.no_grad()
def test_logits_are_those_of_qwen2(pair, ids):
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=SMALL.vocab,
        hidden_size=SMALL.hidden,
        num_hidden_layers=SMALL.layers,
        num_attention_heads=SMALL.heads,
        num_key_value_heads=SMALL.kv_heads,
        intermediate_size=SMALL.ffn,
        rope_parameters={"rope_type": "default", "rope_theta": SMALL.theta},
        rms_norm_eps=SMALL.eps,
        tie_word_embeddings=False,
    )
    reference = transformers.Qwen2ForCausalLM(config).eval()
    reference.load_state_dict(pair.source.weights)
    # Two float32 implementations of three layers whose logits are of size 10.
    torch.testing.assert_close(
        logits(pair.source, ids), reference(ids).logits, rtol=1e-5, atol=5e-5
    )


@torch.no_grad()
def test_greedy_answers_are_the_likeliest_tokens_one_by_one(pair, ids, adapter):
    """Biases of queries, keys and values and an output matrix of its own, with an update merged."""
    tokens, starts = [row.numpy() for row in ids[:6]], torch.tensor([3, 9, 5, 7, 4, 8]).numpy()
    evaluator = Evaluator(SMALL, pair.source.weights)
    evaluator.load(pair.source.weights, adapter.factors)
    answers = evaluator.answers(lm_data.Examples(tokens, starts), 10)
    for row, start, answer in zip(tokens, starts, answers, strict=True):
        text = row[:start].tolist()
        while len(text) < start + 10 and lm_data.END not in text[start:]:
            scores = logits(pair.source, torch.tensor([text]), adapter.factors)
            text.append(int(scores[0, -1].argmax()))
        assert answer == [token for token in text[start:] if token != lm_data.END]


@torch.no_grad()
def test_the_larger_model_computes_the_same(pair, ids):
    # The same, by way of other sums in float32.
    torch.testing.assert_close(
        logits(pair.source, ids), logits(pair.target, ids), rtol=1e-4, atol=5e-4
    )


def share_kept(pair, ids, adapter, moved, back=False):
    """Share of what the adapter does to the logits that the moved one does."""
    source, target = (pair.target, pair.source) if back else (pair.source, pair.target)
    with torch.no_grad():
        bare = logits(source, ids)
        want = logits(source, ids, adapter.factors) - bare
        error = logits(target, ids, moved) - bare - want
    return float(1 - error.square().sum() / want.square().sum())


@pytest.mark.parametrize(
    ("method", "least"), [("fitted", 0.75), ("followed", 0.2)], ids=["fitted", "followed"]
)
def test_maps_from_a_text_carry_an_adapter_to_a_larger_twin(pair, ids, adapter, method, least):
    """On text that the maps have not seen; copying coordinates does nothing of the kind.

    The ridge, the MLP's rarely used units and, in `followed`, that only MLPs act keep it from 1.
    """
    seen = torch.randint(3, SMALL.vocab, (80, 12), generator=torch.Generator().manual_seed(9))
    both = sizes_maps.reading(pair, sizes_maps.Text(seen), torch.float32)
    if method == "fitted":
        (moved, again), _ = sizes_maps.fitted(both, [adapter, adapter])
        for name, (B, A) in moved.items():
            # Two columns of one product: sums in another order.
            torch.testing.assert_close(B @ A, again[name][0] @ again[name][1])
    else:
        moved, to_logits = sizes_maps.followed(both, adapter, rank=48)
        assert share_kept(pair, ids, adapter, to_logits) > least
        assert [n for n in moved if moved[n] is not to_logits[n]] == [LAST]
    assert share_kept(pair, ids, adapter, moved) > least
    assert share_kept(pair, ids, adapter, sizes_maps.padded(pair, adapter)) < 0.1


def test_output_matrices_tell_which_states_have_which_logits(pair):
    """The larger model's states are the smaller's in other coordinates: so much must be found."""
    text = sizes_maps.Text(torch.zeros(1, 2, dtype=torch.long))
    back = lm_methods.Pair(pair.target, pair.source)
    both = sizes_maps.reading(back, text, torch.float32)
    states = torch.randn(20, SMALL.hidden, generator=torch.Generator().manual_seed(0))
    U_s, U_t = head(pair.target.weights), head(pair.source.weights)
    wide = torch.linalg.lstsq(U_s, U_t @ states.T).solution
    found = sizes_maps.logit_map(both) @ wide
    # The ridge, and logits up to what all tokens share.
    difference = U_t @ (found - states.T)
    assert (difference - difference.mean(0)).abs().max() < 1e-3


@pytest.mark.parametrize(("rows", "n"), [(40, 9), (9, 40)], ids=["primal", "dual"])
def test_ridge_is_its_definition(rows, n):
    g = torch.Generator().manual_seed(0)
    X, Y, B = (torch.randn(*size, generator=g) for size in ((rows, n), (rows, 5), (n, 3)))
    found = sizes_maps.Ridge(X, Y, (0.1,))
    X, Y = X.double(), Y.double()
    weight = 0.1 * X.square().mean() * rows
    want = torch.linalg.solve(X.T @ X + weight * torch.eye(n), X.T @ Y)
    torch.testing.assert_close(found.weights(), want)
    # In float32 at the end.
    torch.testing.assert_close(found.carry(B).double(), want.T @ B.double(), rtol=1e-5, atol=1e-6)


def test_ridge_chooses_what_predicts():
    """Little noise wants little of it; a target that is noise wants all there is."""
    g = torch.Generator().manual_seed(0)
    X, noise = torch.randn(50, 30, generator=g), torch.randn(50, 4, generator=g)
    clear = X @ torch.randn(30, 4, generator=g)
    assert sizes_maps.Ridge(X, clear).strength == sizes_maps.STRENGTHS[0]
    assert sizes_maps.Ridge(X, noise).strength == sizes_maps.STRENGTHS[-1]


def test_low_rank_is_ridge_at_full_rank_and_better_than_its_truncation():
    g = torch.Generator().manual_seed(0)
    X = torch.randn(60, 8, generator=g) * torch.linspace(0.1, 3, 8)
    Y = torch.randn(60, 6, generator=g)
    ridge = sizes_maps.Ridge(X, Y, (1e-4,))
    W = ridge.weights().float()
    B, A = ridge.low_rank(6)
    torch.testing.assert_close((B @ A).T, W, rtol=1e-4, atol=1e-5)
    B, A = ridge.low_rank(2)
    U, S, Vh = torch.linalg.svd(W)
    truncated = U[:, :2] * S[:2] @ Vh[:2]
    assert (X @ A.T @ B.T - Y).norm() < (X @ truncated - Y).norm()


def test_written_text_starts_as_given_and_follows_the_model(pair):
    starts = torch.full((64, 2), 7)
    found = sizes_maps.write_text(SMALL, pair.source.weights, starts, 5)
    assert found.shape == (64, 5)
    assert (found[:, :2] == 7).all()
    with torch.no_grad():
        chances = logits(pair.source, starts)[0, -1].softmax(0)
    likely = chances.topk(20)
    share = torch.isin(found[:, 2], likely.indices).float().mean()
    # A binomial share of 64 is within 0.2 of its mean by more than three deviations.
    assert abs(float(share - likely.values.sum())) < 0.2


def test_adding_logits_of_one_and_the_same_model_is_that_model(pair, ids, adapter):
    """The control's loss, where source and target are one: that of the adapted model."""
    same = lm_methods.Pair(pair.source, pair.source)
    both = sizes_maps.reading(same, sizes_maps.Text(ids), torch.float32)
    tokens = [row.numpy() for row in ids]
    examples = lm_data.Examples(tokens, torch.full((len(tokens),), 6).numpy())
    found = sizes_maps.proxy_loss(both, adapter, examples, ids.shape[1])
    with torch.no_grad():
        own = logits(pair.source, ids, adapter.factors)[:, 5:-1]
    want = F.cross_entropy(own.flatten(0, 1), ids[:, 6:].flatten())
    assert found["nll"] == pytest.approx(float(want), rel=1e-5)
    # No token of these texts is the end mark.
    assert found["words_nll"] == pytest.approx(found["nll"])


def test_weights_come_back_rounded_from_parts(pair, tmp_path):
    writer = sizes_pack.Writer(tmp_path, part_bytes=9000)
    weights = pair.source.weights
    errors = writer.model("small", SMALL, list(weights), weights.__getitem__, lambda name: 0.2)
    parts = writer.close()
    assert parts > 3
    for part in range(parts):
        for path in (tmp_path / f"{part:02d}").iterdir():
            assert path.name == sizes_pack.INDEX or path.stat().st_size <= 9000
            path.replace(tmp_path / path.name)
    shape, found = sizes_pack.load(tmp_path, "cpu")["small"]
    assert shape == SMALL
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        if value.dim() == 1:
            assert torch.equal(found[name], value)
            continue
        # Uniform rounding of a bell curve: a step over the root of twelve, less what its tails add.
        assert errors[name] == pytest.approx(0.2 / 12**0.5, rel=0.05)
        step = 0.2 * value.square().mean(1, keepdim=True).sqrt()
        assert ((found[name] - value).abs() <= 0.51 * step).all()
    (tmp_path / "weights.01").unlink()
    with pytest.raises(SystemExit, match=r"lacks weights\.01"):
        sizes_pack.load(tmp_path, "cpu")


def test_tokens_are_renumbered_to_those_in_use():
    end = sizes_data.SPECIAL[2]
    rows = {"train": [([900, 7], [40, end], "x")], "test": [([7], [end], "y")]}
    vocabulary = sizes_data.used_tokens(rows)
    assert vocabulary == [*sizes_data.SPECIAL, 7, 40, 900]
    assert sizes_data.renumber(rows["train"], vocabulary) == [([5, 3], [4, lm_data.END], "x")]


def test_answers_that_go_on_are_also_scored_where_they_should_have_ended():
    pytest.importorskip("sacrebleu", reason="answers are scored")
    references = ["Je pense que tu as raison, bien sûr.", "Elle ne parle jamais de son travail."]
    ended = report.scores("enfr", references, references)
    assert set(ended.values()) == {100.0}
    by_line = [f"{references[0]}\nEnglish: no", f"{references[1]}<|endoftext|>A sentence"]
    found = report.scores("enfr", by_line, references)
    assert found["bleu"] < 90
    assert found["line_bleu"] == 100
    on_one_line = [f"{r} French: {r}" for r in references]
    found = report.scores("enfr", on_one_line, references)
    assert found["line_bleu"] == found["bleu"] < 90
    assert found["length_bleu"] == found["length_chrf"] == 100


def test_everything_is_measured(tmp_path, monkeypatch):
    document = tmp_path / "page.md"
    document.write_text("before\n<!-- tables -->\nold\n<!-- end of tables -->\nafter\n")
    output = tmp_path / "sizes.json"
    sizes.main(["measure", "--reduced", "--device", "cpu", "--output", str(output)])
    rows = json.loads(output.read_text())["rows"]
    for source, target in (("small", "large"), ("large", "small")):
        kept = {
            row["method"]: report.lift(rows, row)
            for row in rows
            if row["target"] == target and row.get("source") == source
        }
        # The models compute the same: what carries an adapter over keeps nearly all of it.
        for method in ("aligned", "fitted, own text", "followed to logits, own text"):
            assert kept[method] > 80, kept
        assert kept["logits added (control)"] > 80
        assert kept["padded (control)"] < 40
    for row in rows:
        assert row["words_nll"] != row["nll"]
    sizes.main(["report", "--input", str(output), "--document", str(document)])
    text = document.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "### small to large" in text
    assert "old" not in text
