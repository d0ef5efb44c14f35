# SPDX-License-Identifier: Apache-2.0
"""The native form of a LoRA-X adapter: cores, and what their bases are recognised by.

The bases `U`, `V` of a layer are the leading singular vectors of its base weight, computed from its
exact values in float64 (`EXACT`): then every vector is determined to about 1e-7 up to a common sign
of the pair, whatever the device, unless singular values are equal to seven digits. So only two
things are stored of them: a digest of the weight, and two random projections of each left vector.
The digest says that it is the same weight, the projections give the sign and show any other basis.
"""

import hashlib

import torch

CORES = ("diagonal", "full", "banded")
PEFT_TYPE = "LORA_X"
# Raised when the meaning of a file changes: its tensors, the bases, the probe or the digest.
FORMAT_VERSION = 1
PROBES = 2
DIGEST_BYTES = 16
# Projector error of the bases; float64 reaches float32's rounding unless values at the cut tie.
TOLERANCE = 1e-5
# Largest deviation of a vector from the one that the core was trained with.
_MAX_DEVIATION = 1e-3


def dense_core(weight: torch.Tensor, form: str) -> torch.Tensor:
    """A core as a matrix `(k, k)`; differentiable.

    Args:
        weight: as stored: `(k,)` diagonal, `(k, k)` full, `(2 w + 1, k)` banded.
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
