# SPDX-License-Identifier: Apache-2.0
"""The demo's task: scores worked out by hand, embeddings against a plain computation."""

from pathlib import Path

import pytest
import torch
from demo_makers import SENTENCES, make_adapter_directory, make_encoder_directory
from safetensors.torch import load_file, save_file
from transformers import BertModel

from lorax_transfer.demo.pairs import SentencePair
from lorax_transfer.demo.task import Encoder, load_encoder, retrieval_scores, score_encoder
from lorax_transfer.errors import AdapterError, TransferError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder_directory(tmp_path_factory.mktemp("demo") / "base", seed=1)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return make_adapter_directory(base.parent / "adapter", base, seed=2)


def test_scores_of_a_hand_worked_search() -> None:
    # Similarities, row = English, column = French, own translation on the diagonal:
    #   0.9 0.1 0.0     ranks from English 1, 2, 3; from French 1, 1, 2
    #   0.8 0.7 0.2
    #   0.6 0.5 0.1
    english = torch.eye(3)
    french = torch.tensor([[0.9, 0.8, 0.6], [0.1, 0.7, 0.5], [0.0, 0.2, 0.1]])
    scores = retrieval_scores(english, french)
    assert scores.english_to_french == pytest.approx(1 / 3)
    assert scores.french_to_english == pytest.approx(2 / 3)
    assert scores.accuracy == pytest.approx(1 / 2)
    assert scores.mean_reciprocal_rank == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 + 1 + 1 / 2) / 6)
    assert scores.pairs == 3


def test_embeddings_that_are_all_alike_find_nothing() -> None:
    scores = retrieval_scores(torch.ones(10, 4), torch.ones(10, 4))
    assert scores.accuracy == 0
    assert scores.mean_reciprocal_rank == pytest.approx(1 / 10)


@pytest.mark.parametrize(
    ("english", "french"),
    [
        pytest.param((3, 4), (2, 4), id="more-english"),
        pytest.param((0, 4), (0, 4), id="nothing"),
        pytest.param((4,), (4,), id="one-dimension"),
    ],
)
def test_unpaired_embeddings_are_refused(english: tuple[int, ...], french: tuple[int, ...]) -> None:
    with pytest.raises(TransferError, match="a row per pair"):
        retrieval_scores(torch.ones(english), torch.ones(french))


def _mean_of_tokens(encoder: Encoder, model: torch.nn.Module, sentence: str) -> torch.Tensor:
    """Embed one sentence with no padding anywhere: the definition, without batching."""
    batch = encoder.tokenizer(sentence, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state[0]
    mean = hidden.mean(dim=0)
    return mean / mean.norm()


def test_batched_embeddings_equal_those_one_by_one_in_the_order_given(base: Path) -> None:
    encoder = load_encoder(base)
    expected = torch.stack([_mean_of_tokens(encoder, encoder.model, s) for s in SENTENCES])
    # Unit vectors through two layers in float32: padding only changes the order of sums (1e-7).
    torch.testing.assert_close(encoder.embed(SENTENCES), expected, atol=1e-5, rtol=0)


def test_embedding_turns_dropout_off_and_leaves_the_mode_as_it_was(base: Path) -> None:
    encoder = load_encoder(base)
    calm = encoder.embed(SENTENCES)
    encoder.model.train()
    torch.testing.assert_close(encoder.embed(SENTENCES), calm, atol=0, rtol=0)
    assert encoder.model.training


def test_adapter_acts_as_its_merged_weights(base: Path, adapter: Path) -> None:
    encoder = load_encoder(base, adapter)
    merged = BertModel.from_pretrained(base).eval()
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, lora_A in tensors.items():
            if name.endswith("lora_A.weight"):
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                lora_B = tensors[name.replace("lora_A", "lora_B")]
                merged.get_submodule(module).weight += 3 * lora_B @ lora_A  # alpha 6 over rank 2
    expected = torch.stack([_mean_of_tokens(encoder, merged, s) for s in SENTENCES])
    with_adapter = encoder.embed(SENTENCES)
    # The same sums in another order: float32 rounding of values near one.
    torch.testing.assert_close(with_adapter, expected, atol=1e-5, rtol=0)
    assert (with_adapter - load_encoder(base).embed(SENTENCES)).abs().max() > 1e-2


def test_adapter_whose_names_do_not_fit_is_refused(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    config = (adapter / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(config)
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name.replace(".layer.0.", ".layer.9."): value for name, value in tensors.items()},
        tmp_path / "adapter_model.safetensors",
    )
    with pytest.raises(AdapterError, match="does not fit"):
        load_encoder(base, tmp_path)


def test_identical_sides_are_found_every_time(base: Path) -> None:
    pairs = [SentencePair(s, s, "") for s in SENTENCES]
    assert score_encoder(load_encoder(base), pairs).accuracy == 1
