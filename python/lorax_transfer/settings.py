# SPDX-License-Identifier: Apache-2.0
"""How a transfer is to be done: the options that both the functions and the command line take."""

import re
from dataclasses import dataclass

from .errors import TransferError

METHODS = ("lorax", "prolora", "transport", "anchor", "restore", "aligned", "copy")
# Those that are defined where the weights' shapes differ.
RESHAPING = ("lorax", "aligned")
DTYPES = ("auto", "fp32", "bf16", "fp16")
FORMS = ("auto", "lorax", "lora")
BACKENDS = ("auto", "cuda", "triton", "reference")

# The rank that LoRA-X was published with.
DEFAULT_RANK = 320

# Directions of each layer's drift that "restore" undoes; docs/methods.md has what was measured.
DEFAULT_DIRECTIONS = 16

# Relative size of the drift that "restore" undoes in a layer unless it is told a strength: all of a
# drift of 0.4 %, half of 0.8 %, and no less than half of a larger one unless what stays outside of
# the adapted layers moved more than `FARTHER` times as far: in the models that were measured that
# is either a third or less, where half won at any drift, or 2.7 to 7 times, where it lost at 1.7 %.
# With the embeddings given back, all of the drift won 0.02 to 0.06 nats more than half of it, and
# cost the target's own text up to 0.5 more: hence half there too. docs/quality.md has what that
# rests on.
RESTORED = 0.004
LEAST_RESTORED = 0.5
FARTHER = 2.0

# Relative projector error of every basis; the rounding of a bf16 adapter is 4e-3.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Settings:
    """The options of one run, checked.

    Attributes:
        method: one of `METHODS`.
        rank: singular directions to keep in every layer; None for `DEFAULT_RANK` or `energy`.
        energy: keep the fewest directions that hold this share of each target weight, in (0, 1].
        min_similarity: leave a layer out where the similarity of U or of V is lower, in [0, 1].
        include: regular expression that a module's path has to contain.
        exclude: regular expression that it must not contain.
        dtype: of the written factors: "auto" (the adapter's own), "fp32", "bf16" or "fp16".
        device: "auto", "cpu", "cuda" or "cuda:N".
        backend: "auto", "cuda", "triton" or "reference".
        form: of the written adapter: "lorax" (cores), "lora" (factors), or "auto": cores where an
            adapter came as cores and still lies in the target's bases.
        strength: share of the drift that "anchor" and "restore" undo where they do, in [0, 1]; None
            for all of it with "anchor", and with "restore" for a share that depends on the drift of
            a layer (`restored_share`).
        directions: singular directions of each layer's drift that "restore" undoes, and of that of
            the embeddings.
        embeddings: share of the drift of the embeddings to undo beside the method, in [0, 1]; with
            0 they stay the target's, and an update that the adapter has there is moved by the
            method.

    Raises:
        TransferError: an option is out of range.
    """

    method: str = "lorax"
    rank: int | None = None
    energy: float | None = None
    min_similarity: float | None = None
    include: str | None = None
    exclude: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    form: str = "auto"
    strength: float | None = None
    directions: int = DEFAULT_DIRECTIONS
    embeddings: float = 0.0

    def __post_init__(self) -> None:
        """Check every option that can be checked without a model."""
        _one_of("method", self.method, METHODS)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("backend", self.backend, BACKENDS)
        _one_of("form", self.form, FORMS)
        if self.rank is not None and self.rank < 1:
            raise TransferError(f"rank is {self.rank}, expected 1 or more.")
        if self.strength is not None and not 0 <= self.strength <= 1:
            raise TransferError(f"strength is {self.strength}, expected a share in [0, 1].")
        if not 0 <= self.embeddings <= 1:
            raise TransferError(f"embeddings is {self.embeddings}, expected a share in [0, 1].")
        if self.embeddings and self.method == "aligned":
            raise TransferError(
                "method aligned cannot give embeddings back: between models of another depth or "
                "width their drift is not defined; leave --embeddings out."
            )
        if self.embeddings and self.form == "lorax":
            raise TransferError(
                "no core stands for an update of the embeddings; use --form lora, or leave "
                "--embeddings out."
            )
        if self.directions < 1:
            raise TransferError(f"directions is {self.directions}, expected 1 or more.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise TransferError(f"energy is {self.energy}, expected a share in (0, 1], e.g. 0.9.")
        if self.min_similarity is not None and not 0 <= self.min_similarity <= 1:
            raise TransferError(
                f"min_similarity is {self.min_similarity}, expected a number in [0, 1], e.g. 0.8."
            )
        for name in ("include", "exclude"):
            pattern = getattr(self, name)
            if pattern is None:
                continue
            try:
                re.compile(pattern)
            except re.error as error:
                raise TransferError(
                    f"{name} is {pattern!r}, which is no regular expression ({error})."
                ) from error

    def excludes(self, module: str) -> str | None:
        """Say which option leaves a module out.

        Args:
            module: path of the module.

        Returns:
            A few words for the report, or None if the module stays.
        """
        if self.include is not None and not re.search(self.include, module):
            return f"not matched by --include {self.include}"
        if self.exclude is not None and re.search(self.exclude, module):
            return f"matched by --exclude {self.exclude}"
        return None

    @property
    def cut(self) -> str:
        """Where the bases are cut, in words: "rank 320", "energy 0.9"."""
        if self.energy is None:
            return f"rank {DEFAULT_RANK if self.rank is None else self.rank}"
        limit = "" if self.rank is None else f", at most rank {self.rank}"
        return f"energy {self.energy:g}{limit}"


def restored_share(drift: float | None, outside: float | None = None) -> float:
    """Share of a layer's drift that "restore" undoes unless it is told a strength.

    Args:
        drift: `||W_t - W_s|| / ||W_s||`; None where it is not defined.
        outside: the same of what lies outside of the adapted layers and stays the target's; None
            where nothing does that moved.

    Returns:
        `min(1, RESTORED / drift)`, and `LEAST_RESTORED` at least, unless what stays outside moved
        more than `FARTHER` times as far: a layer that is the source's again does not fit to it.

    Example:
        >>> restored_share(0.002), restored_share(0.02), restored_share(0.02, 0.1)
        (1.0, 0.5, 0.2)
    """
    if not drift:
        return 1.0
    share = min(1.0, RESTORED / drift)
    return share if is_farther(outside, drift) else max(share, LEAST_RESTORED)


def is_farther(outside: float | None, drift: float) -> bool:
    """Whether what lies outside of the adapted layers moved much farther than they did.

    Args:
        outside: its drift; None where it is not defined.
        drift: that of the layers.
    """
    return outside is not None and outside > FARTHER * drift


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TransferError(f"{name} is {value!r}, expected one of {', '.join(allowed)}.")
