# SPDX-License-Identifier: Apache-2.0
"""The native form of a LoRA-X adapter: cores, and what their bases are recognised by.

The bases `U`, `V` of a layer are the leading singular vectors of its base weight, computed from its
exact values in float64: then every vector is determined to about 1e-7 up to a common sign
of the pair, whatever the device, unless singular values are equal to seven digits. So only two
things are stored of them: a digest of the weight, and two random projections of each left vector.
The digest says that it is the same weight, the projections give the sign and show any other basis.
"""

import hashlib
import logging
from collections.abc import Mapping
from typing import Any

import torch

import lorax_kernels as lk
from lorax_transfer.errors import AdapterError

_log = logging.getLogger(__name__)

CORES = ("diagonal", "full", "banded")
PEFT_TYPE = "LORA_X"
# Raised when the meaning of a file changes: its tensors, the bases, the probe or the digest.
FORMAT_VERSION = 1
PROBES = 2
DIGEST_BYTES = 16
# Projector error of the bases; float64 reaches float32's rounding unless values at the cut tie.
TOLERANCE = 1e-5
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Directions of smaller singular values are rounding noise even in float64.
_MIN_RATIO = 1e-4
# Two units in the last place of float32.
_MIN_GAP = 2.4e-7
# Largest deviation of a vector from the one that the core was trained with.
_MAX_DEVIATION = 1e-3


def core_shape(form: str, rank: int, bandwidth: int) -> tuple[int, ...]:
    """Shape in which a core of a form is stored."""
    if form == "banded":
        return (2 * bandwidth + 1, rank)
    return (rank,) if form == "diagonal" else (rank, rank)


def dense_core(weight: torch.Tensor, form: str) -> torch.Tensor:
    """A core as a matrix `(k, k)`; differentiable.

    Args:
        weight: as stored: `(k,)` diagonal, `(k, k)` full, `(2 w + 1, k)` banded.
            with row `i` the diagonal `i - w`, in its first entries.
        form: "diagonal", "full" or "banded".
    """
    if form == "diagonal":
        return torch.diag(weight)
    if form == "full":
        return weight
    rank, width = weight.shape[1], len(weight) // 2
    diagonals = [
        torch.diag(weight[width + d, : rank - abs(d)], d)
        for d in range(-width, width + 1)
        if abs(d) < rank
    ]
    return torch.stack(diagonals).sum(0)


def check_basis(svd: lk.SVD, module: str) -> lk.SVD:
    """See to it that the singular vectors of a basis can be found again.

    Args:
        svd: exact basis of a weight.
        module: its module, for the error.

    Returns:
        The basis, without directions along which the weight is zero.

    Raises:
        AdapterError: the weight is zero, or singular values are equal.
    """
    S = svd.S
    rank = int((_MIN_RATIO * S[0] < S).sum())
    if rank == 0:
        raise AdapterError(
            f"the base weight of {module} is zero and has no singular directions; leave it out of "
            "the target modules."
        )
    if rank < len(S):
        _log.warning("%s has %d directions only, %d were asked for.", module, rank, len(S))
        svd = svd.truncate(rank)
    elif not svd.error <= TOLERANCE:
        raise AdapterError(
            f"the singular values of {module} at rank {rank} are equal, so that no subspace is "
            "determined; choose another rank or leave it out of the target modules."
        )
    gaps = (S[: rank - 1] - S[1:rank]) / S[: rank - 1]
    if rank > 1 and float(gaps.min()) < _MIN_GAP:
        raise AdapterError(
            f"singular values of {module} are equal to seven digits, so that its singular vectors "
            "are not determined; leave it out of the target modules."
        )
    return svd


def check_convolution(module: str, how: Mapping[str, Any]) -> None:
    """See to it that an ordinary LoRA of PEFT computes a convolution as its base layer does.

    Args:
        module: its module, for the error.
        how: its "dilation" and "padding_mode", as the native form records them.

    Raises:
        AdapterError: it does not.
    """
    dilation, padding_mode = how["dilation"], how["padding_mode"]
    if set(dilation) != {1} or padding_mode != "zeros":
        raise AdapterError(
            f"{module} is a convolution with dilation {tuple(dilation)} and padding mode "
            f"{padding_mode!r}, which PEFT's LoRA passes over; keep the native form, or merge the "
            "adapter into the model."
        )


def digest(weight: torch.Tensor) -> torch.Tensor:
    """What a weight is recognised by: 16 bytes of a hash of its dtype, shape and values.

    Args:
        weight: any floating dtype and shape.

    Returns:
        `(16,)` uint8 on the CPU.
    """
    data = weight.detach().cpu().contiguous()
    found = hashlib.sha256(f"{data.dtype} {list(data.shape)} ".encode())
    found.update(data.flatten().view(torch.uint8).numpy().data)
    return torch.tensor(list(found.digest()[:DIGEST_BYTES]), dtype=torch.uint8)


def probe(U: torch.Tensor) -> torch.Tensor:
    """Two projections of every left singular vector on directions fixed by a formula.

    Args:
        U: `(m, k)` with orthonormal columns.

    Returns:
        `(2, k)` float32 on U's device, entries of order one.
    """
    # Not a generator: the numbers have to be the same with every version of torch.
    i = torch.arange(1, len(U) + 1, dtype=torch.float64)
    angles = torch.stack([i * i * root % 1 for root in (2**0.5, 3**0.5)]) * (2 * torch.pi)
    directions = 2**0.5 * angles.cos()
    return (directions.to(U.device) @ U.double()).float()


def matching(weight: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor | None:
    """A weight in the dtype in which it is the one that a digest was made of.

    A model may be loaded in another dtype than it was trained in: what was rounded then has to be
    rounded now before its singular vectors are those that the core belongs to.

    Args:
        weight: in the layout of its checkpoint.
        wanted: `(16,)` uint8.

    Returns:
        The weight, cast where needed; None if it is another weight.
    """
    for dtype in dict.fromkeys((weight.dtype, *_WEIGHT_DTYPES)):
        cast = weight.to(dtype)
        if torch.equal(digest(cast), wanted.cpu()):
            return cast
    return None


def align(core: torch.Tensor, form: str, stored: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """A core in the signs of the bases at hand.

    Args:
        core: as stored, with bases whose probe is `stored`.
        form: "diagonal", "full" or "banded".
        stored: `(2, k)`.
        found: `(2, k)`, the probe of the bases at hand.

    Returns:
        A core of the same form and the same update.

    Raises:
        AdapterError: these are other bases.
    """
    sign, deviation = signs(stored, found)
    if not deviation <= _MAX_DEVIATION:
        raise AdapterError(
            f"singular vectors differ by {deviation:.1e} from those that the adapter was trained "
            f"with, expected {_MAX_DEVIATION:g} at most, although the weight is the same; fold it "
            "to an ordinary LoRA on the machine that trained it."
        )
    if form == "diagonal":
        return core  # a common sign of u and v cancels
    sign = sign.to(core.device, core.dtype)
    if form == "full":
        return sign[:, None] * core * sign
    rank, width = core.shape[1], len(core) // 2
    flipped = core.clone()
    for d in range(-min(width, rank - 1), min(width, rank - 1) + 1):
        rows, columns = sign[max(0, -d) : rank - max(0, d)], sign[max(0, d) : rank - max(0, -d)]
        flipped[width + d, : rank - abs(d)] *= rows * columns
    return flipped


def signs(stored: torch.Tensor, found: torch.Tensor) -> tuple[torch.Tensor, float]:
    """How the vectors at hand relate to those that a core was trained with.

    Args:
        stored: `(2, k)`, the probe of the vectors that the core was trained with.
        found: `(2, k)`, the probe of the vectors at hand.

    Returns:
        The sign of each pair, `(k,)`, and the largest deviation of a vector, about
        `||u - u'||`.
    """
    stored, found = stored.double(), found.double()
    sign = torch.where((stored * found).sum(0) < 0, -1.0, 1.0).to(stored.dtype)
    deviation = torch.linalg.vector_norm(stored - sign * found, dim=0) / PROBES**0.5
    return sign.float(), float(deviation.max())
