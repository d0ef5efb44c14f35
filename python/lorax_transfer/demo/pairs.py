# SPDX-License-Identifier: Apache-2.0
"""The demo's sentence pairs, and the rule that keeps training and evaluation apart.

A pair is English and French with the attribution that Tatoeba's licence asks for. Whether a pair
may be trained on depends on nothing but its two sentences, so anybody who holds the evaluation
file can check that none of it was trained on.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources

from lorax_transfer.errors import TransferError

SPLIT_BUCKETS = 8
_NOT_A_WORD = re.compile(r"[\W_]+")


@dataclass(frozen=True)
class SentencePair:
    """One English sentence, one French translation of it, and who wrote them.

    Attributes:
        english: The English sentence.
        french: The French sentence.
        attribution: Licence and authors, as the corpus states them.
    """

    english: str
    french: str
    attribution: str


def normalise_sentence(sentence: str) -> str:
    """Reduce a sentence to its words: compatibility form, case folded, punctuation dropped.

    Args:
        sentence: Any text.

    Returns:
        The words, separated by single spaces. Two sentences with the same result count as one.

    Example:
        >>> normalise_sentence("Va-t'en\u202f!")
        'va t en'
    """
    folded = unicodedata.normalize("NFKC", sentence).casefold()
    return _NOT_A_WORD.sub(" ", folded).strip()


def split_bucket(sentence: str) -> int:
    """Give the bucket of a sentence: SHA-256 of its normalised form modulo `SPLIT_BUCKETS`.

    Args:
        sentence: Any text.

    Returns:
        0 to 7. Bucket 0 is kept for evaluation.
    """
    digest = hashlib.sha256(normalise_sentence(sentence).encode()).digest()
    return int.from_bytes(digest[:8], "big") % SPLIT_BUCKETS


def is_evaluation_pair(pair: SentencePair) -> bool:
    """Say whether a pair belongs to the evaluation side: both sentences in bucket 0."""
    return split_bucket(pair.english) == 0 and split_bucket(pair.french) == 0


def is_training_pair(pair: SentencePair) -> bool:
    """Say whether a pair may be trained on: neither sentence in bucket 0.

    A pair with one sentence in bucket 0 is used for nothing, so no evaluation sentence, on
    either side, is ever seen in training.
    """
    return split_bucket(pair.english) != 0 and split_bucket(pair.french) != 0


def parse_pairs(lines: Iterable[str]) -> Iterator[SentencePair]:
    r"""Read tab-separated lines of English, French and attribution.

    Args:
        lines: Text lines, with or without their line ends.

    Yields:
        One pair per line.

    Raises:
        TransferError: A line does not have three non-empty columns.

    Example:
        >>> list(parse_pairs(["Go.\tVa !\tCC-BY 2.0 (France)"]))[0].french
        'Va !'
    """
    for number, line in enumerate(lines, start=1):
        columns = line.rstrip("\r\n").split("\t")
        if len(columns) != 3 or not all(columns):
            raise TransferError(
                f"Line {number} of the sentence pairs should hold three tab-separated columns "
                f"(English, French, attribution) but holds {len(columns)}: take the file whole "
                "from its source."
            )
        yield SentencePair(*columns)


def without_repeats(pairs: Iterable[SentencePair]) -> Iterator[SentencePair]:
    """Keep the first pair with each English and each French sentence, compared normalised.

    Retrieval needs this: with a sentence on two lines, a right answer would count as wrong.

    Args:
        pairs: Pairs in a fixed order.

    Yields:
        Pairs that share no sentence with an earlier one.
    """
    english: set[str] = set()
    french: set[str] = set()
    for pair in pairs:
        key = normalise_sentence(pair.english), normalise_sentence(pair.french)
        if key[0] in english or key[1] in french:
            continue
        english.add(key[0])
        french.add(key[1])
        yield pair


def evaluation_pairs() -> list[SentencePair]:
    """Read the evaluation pairs that ship with the package.

    Returns:
        The pairs in file order. None of them, on either side, was trained on.
    """
    text = resources.files(__package__).joinpath("data", "pairs.tsv").read_text("utf-8")
    return list(parse_pairs(text.splitlines()))
