# SPDX-License-Identifier: Apache-2.0
"""The demo's task: find the translation of a sentence among many, by embedding both.

Sentences are embedded as the two models do it (mean over tokens, then unit length) and matched by
cosine similarity, English to French and back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorax_transfer.demo.pairs import SentencePair
from lorax_transfer.errors import AdapterError, TransferError

MAX_TOKENS = 64
_BATCH = 64


@dataclass(frozen=True)
class Encoder:
    """A sentence encoder: a transformer and the tokenizer that belongs to it.

    Attributes:
        model: Maps input_ids and attention_mask to an output with last_hidden_state (b, t, d).
        tokenizer: A Hugging Face tokenizer.
    """

    model: torch.nn.Module
    tokenizer: Any

    def embed_tokens(self, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
        """Embed a padded batch, keeping the graph when gradients are on.

        Args:
            tokens: input_ids and attention_mask, both (b, t), int64.

        Returns:
            (b, d) float32, rows of unit length.
        """
        hidden = self.model(**tokens).last_hidden_state
        mask = tokens["attention_mask"].unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return torch.nn.functional.normalize(mean, dim=-1)

    def tokenize(self, sentences: Sequence[str]) -> dict[str, torch.Tensor]:
        """Turn sentences into one batch, padded to the longest and cut at `MAX_TOKENS`."""
        batch = self.tokenizer(
            list(sentences),
            padding=True,
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        )
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def embed(self, sentences: Sequence[str]) -> torch.Tensor:
        """Embed sentences for scoring, without gradients and with dropout off.

        Args:
            sentences: At least one sentence.

        Returns:
            (len(sentences), d) float32 in the order given, rows of unit length.
        """
        # Batches of like lengths: padding to the longest of all would triple the work.
        order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                parts = [
                    self.embed_tokens(
                        self.tokenize([sentences[i] for i in order[at : at + _BATCH]])
                    )
                    for at in range(0, len(order), _BATCH)
                ]
        finally:
            self.model.train(training)
        embedded = torch.cat(parts)
        return embedded[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class Retrieval:
    """How well translations were found.

    Attributes:
        english_to_french: Share of English sentences whose own translation came first, 0 to 1.
        french_to_english: The same from French.
        mean_reciprocal_rank: Mean over both directions of 1 / rank, 0 to 1.
        pairs: How many pairs were searched.
    """

    english_to_french: float
    french_to_english: float
    mean_reciprocal_rank: float
    pairs: int

    @property
    def accuracy(self) -> float:
        """Mean of the two accuracies: the one number the demo compares by."""
        return (self.english_to_french + self.french_to_english) / 2


def retrieval_scores(english: torch.Tensor, french: torch.Tensor) -> Retrieval:
    """Score paired embeddings as a search in both directions.

    The rank of a sentence's own translation counts every other candidate that is at least as
    near, so embeddings that are all alike score near zero, not one.

    Args:
        english: (n, d), row i belongs to row i of `french`.
        french: (n, d), of the same dtype.

    Returns:
        Accuracy at rank one both ways, and the mean reciprocal rank.

    Raises:
        TransferError: The two shapes differ, or there is nothing to score.

    Example:
        >>> retrieval_scores(torch.eye(3), torch.eye(3)).accuracy
        1.0
    """
    if english.shape != french.shape or english.ndim != 2 or len(english) == 0:
        raise TransferError(
            "Retrieval needs two equally shaped matrices with a row per pair, not "
            f"{tuple(english.shape)} and {tuple(french.shape)}: embed both sides of the same pairs."
        )
    similarity = english @ french.T
    own = similarity.diagonal()
    rank_forth = (similarity >= own.unsqueeze(1)).sum(dim=1).double()
    rank_back = (similarity >= own.unsqueeze(0)).sum(dim=0).double()
    return Retrieval(
        english_to_french=(rank_forth == 1).double().mean().item(),
        french_to_english=(rank_back == 1).double().mean().item(),
        mean_reciprocal_rank=torch.cat([1 / rank_forth, 1 / rank_back]).mean().item(),
        pairs=len(english),
    )


def score_encoder(encoder: Encoder, pairs: Sequence[SentencePair]) -> Retrieval:
    """Embed both sides of `pairs` and score the search.

    Args:
        encoder: The model under test.
        pairs: Pairs in which no sentence occurs twice.

    Returns:
        The scores over all pairs.
    """
    english = encoder.embed([pair.english for pair in pairs])
    french = encoder.embed([pair.french for pair in pairs])
    return retrieval_scores(english, french)


def load_encoder(directory: Path, adapter: Path | None = None) -> Encoder:
    """Load a BERT encoder from local files, with a PEFT adapter on top if one is given.

    Args:
        directory: Holds config.json, model.safetensors and the tokenizer's files.
        adapter: A PEFT adapter folder, or None for the model alone.

    Returns:
        The encoder in float32, in evaluation mode.

    Raises:
        TransferError: transformers or peft is not installed.
        AdapterError: The adapter does not fill every place that its configuration names.
    """
    try:
        from transformers import AutoTokenizer, BertModel
    except ImportError as error:
        raise _library_missing("transformers") from error
    with _quiet_loading():
        model: torch.nn.Module = BertModel.from_pretrained(
            directory, local_files_only=True, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    if adapter is not None:
        model = _attach_adapter(model, adapter)
    return Encoder(model.eval(), tokenizer)


def _attach_adapter(model: torch.nn.Module, adapter: Path) -> torch.nn.Module:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise _library_missing("peft") from error
    with warnings.catch_warnings():
        # peft only warns when a key does not fit, and then scores the model without it.
        warnings.filterwarnings("error", message="Found missing adapter keys")
        # peft 0.21 asks transformers 5 for a property under its former name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        try:
            return PeftModel.from_pretrained(model, adapter)
        except UserWarning as error:
            raise AdapterError(
                f"The adapter in {adapter} does not fit the model it is loaded on "
                f"({error}): check that its tensor names are those of this model."
            ) from error


def _library_missing(name: str) -> TransferError:
    return TransferError(
        f"The demo runs its models with {name}, which is not installed: run `pip install {name}`."
    )


@contextmanager
def _quiet_loading() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
