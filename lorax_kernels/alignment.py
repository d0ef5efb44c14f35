# SPDX-License-Identifier: Apache-2.0
"""Maps between models of different width and depth, found from their weights alone."""

from collections.abc import Sequence

import torch

# Bytes of a float64 piece of an embedding matrix that exist at a time.
_CHUNK_BYTES = 2**26
# Gains of a norm under this share of their root mean square are taken as that: what such a channel
# carries is not seen by the layer, and dividing by it would only enlarge noise.
_SMALL_GAIN = 0.05
# Singular values under this share of the largest are rounding: of float32 weights, in products.
_NULL = 1e-6


Pairs = Sequence[tuple[torch.Tensor, torch.Tensor]]


@torch.no_grad()
def procrustes(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    """The `P` `(q, p)` that minimises `||X P^T - Y||_F` and keeps lengths.

    For two descriptions of the same things in spaces of different dimension, such as two models'
    embeddings of one vocabulary: `P` then carries the residual stream of one to the other. With
    `Y^T X = L S R^T`, `P = L R^T` (Schoenemann, Psychometrika 31, 1966).

    Args:
        X: `(N, p)`, any floating dtype; a row for each thing.
        Y: `(N, q)`, rows in the same order.

    Returns:
        `P` in float32: orthonormal columns where `q >= p`, orthonormal rows where `q <= p`.
        Directions that no row tells anything about, where there are fewer rows than `p` and `q`, go
        to zero.

    Raises:
        ValueError: the numbers of rows differ.

    Example:
        >>> procrustes(torch.eye(3)[:, :2], torch.eye(3)).T
        tensor([[1., 0., 0.],
                [0., 1., 0.]])
    """
    if X.dim() != 2 or Y.dim() != 2 or len(X) != len(Y):
        raise ValueError(
            f"two matrices with equally many rows are needed, got {tuple(X.shape)} and "
            f"{tuple(Y.shape)}"
        )
    if len(X) < min(X.shape[1], Y.shape[1]):
        return _polar_of_product(Y.double().mT, X.double()).float()
    rows = max(1, _CHUNK_BYTES // (8 * max(X.shape[1], Y.shape[1])))
    cross = torch.zeros(Y.shape[1], X.shape[1], dtype=torch.float64, device=X.device)
    for x, y in zip(X.split(rows), Y.split(rows), strict=True):
        cross += y.double().mT @ x.double()
    return _polar(cross).float() if len(cross) >= len(cross.mT) else _polar(cross.mT).mT.float()


def _polar_of_product(L: torch.Tensor, R: torch.Tensor) -> torch.Tensor:
    """`_polar` of `L R` where the two share a short side: of a square matrix of that side."""
    Q_L, T_L = torch.linalg.qr(L)
    Q_R, T_R = torch.linalg.qr(R.mT)
    return Q_L @ _polar(T_L @ T_R.mT) @ Q_R.mT


def _polar(M: torch.Tensor) -> torch.Tensor:
    """`L R^T` of the SVD `L S R^T` of a tall matrix, without the directions where `S` is zero.

    Through the Gram matrix: an MLP's hidden space of 8960 by 4864 takes an SVD minutes on a GPU.
    Its rounding in float64 is far below `_NULL` squared.
    """
    squares, R = torch.linalg.eigh(M.mT @ M)
    told = squares > _NULL**2 * squares[-1:]
    inverse = torch.where(told, squares, 1.0).rsqrt() * told
    return M @ (R * inverse) @ R.mT


@torch.no_grad()
def inner_map(stream: torch.Tensor, reads: Pairs = (), writes: Pairs = ()) -> torch.Tensor:
    """Map between what two layers have inside: the hidden units of an MLP, the heads of attention.

    Every weight that reads the residual stream into that space, or writes from it, says where its
    units lie in the stream; `stream` brings the source's into the target's coordinates, and
    `procrustes` of all together is the map. More weights tell more: an MLP's hidden space is wider
    than the stream, so that one weight alone leaves most of its directions open.

    Args:
        stream: `P` `(d_t, d_s)`, the map of the residual streams.
        reads: weights `(h_s, d_s)` and `(h_t, d_t)` of source and target, `gate_proj` and `up_proj`
            for instance.
        writes: weights `(d_s, h_s)` and `(d_t, h_t)`, `down_proj` for instance.

    Returns:
        `(h_t, h_s)`, float32.

    Raises:
        ValueError: no weights, or shapes that do not fit.

    Example:
        >>> W = torch.randn(5, 3)
        >>> torch.allclose(inner_map(torch.eye(3), reads=[(W, W)]) @ W, W, atol=1e-5)
        True
    """
    pairs = [(W_s.mT, W_t.mT) for W_s, W_t in reads] + list(writes)
    if not pairs:
        raise ValueError("at least one pair of weights is needed")
    P = stream.double()
    left: list[torch.Tensor] = []
    right: list[torch.Tensor] = []
    for W_s, W_t in pairs:
        if (W_t.shape[0], W_s.shape[0]) != tuple(P.shape):
            raise ValueError(
                f"the stream's map is {tuple(P.shape)}, so weights must meet streams of "
                f"{P.shape[1]} and {P.shape[0]}, got {W_s.shape[0]} and {W_t.shape[0]}"
            )
        X, Y = W_s.double(), W_t.double()
        tiny = torch.finfo(torch.float64).tiny
        # Each weight says as much as any other, whatever its size. Only `X^T P^T Y` matters: P is
        # applied where that leaves fewer rows.
        X, Y = X / (P @ X).norm().clamp(min=tiny), Y / Y.norm().clamp(min=tiny)
        wide = P.shape[0] > P.shape[1]
        left.append(X if wide else P @ X)
        right.append(P.mT @ Y if wide else Y)
    return procrustes(torch.cat(left), torch.cat(right))


@torch.no_grad()
def align_lora(
    lora_B: torch.Tensor,
    lora_A: torch.Tensor,
    output_map: torch.Tensor | None = None,
    input_map: torch.Tensor | None = None,
    *,
    gains: tuple[torch.Tensor, torch.Tensor] | None = None,
    size: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Carries an update through maps of a layer's outputs and inputs: `B_t = c R B`, `A_t = A P^T`.

    Args:
        lora_B: `(m_s, r)`, any floating dtype.
        lora_A: `(r, n_s)`.
        output_map: `R` `(m_t, m_s)`; None for the identity.
        input_map: `P` `(n_t, n_s)`; None for the identity.
        gains: weights `g_s` `(n_s,)` and `g_t` `(n_t,)` of the norms in front of the two layers.
            They belong to how a layer reads the stream, so `A diag(g_s) P^T diag(g_t)^-1` is used.
        size: `c`; `||W_t|| / ||W_s||` leaves the update as large beside its weight as it was.

    Returns:
        `lora_B` `(m_t, r)` and `lora_A` `(r, n_t)`, in the dtypes that came in.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> P = procrustes(torch.eye(4)[:, :3], torch.eye(4))
        >>> B, A = align_lora(torch.ones(2, 1), torch.ones(1, 3), None, P)
        >>> B.shape, A
        (torch.Size([2, 1]), tensor([[1., 1., 1., 0.]]))

    The method is this project's; docs/methods.md says where it helps and where it does not.
    """
    if lora_B.dim() != 2 or lora_A.dim() != 2 or lora_B.shape[1] != lora_A.shape[0]:
        raise ValueError(
            f"factors must be (m, r) and (r, n), got {tuple(lora_B.shape)} and "
            f"{tuple(lora_A.shape)}"
        )
    for name, given, side in (
        ("output_map", output_map, lora_B.shape[0]),
        ("input_map", input_map, lora_A.shape[1]),
    ):
        if given is not None and (given.dim() != 2 or given.shape[1] != side):
            raise ValueError(f"{name} must have {side} columns, got shape {tuple(given.shape)}")
    B, A = lora_B.double(), lora_A.double()
    if gains is not None:
        A = A * gains[0].double()
    B = size * (B if output_map is None else output_map.double() @ B)
    A = A if input_map is None else A @ input_map.double().mT
    if gains is not None:
        g = gains[1].double()
        floor = _SMALL_GAIN * g.square().mean().sqrt()
        A = A / torch.where(g.abs() < floor, torch.where(g < 0, -floor, floor), g)
    return B.to(lora_B.dtype), A.to(lora_A.dtype)


def match_depth(likeness: Sequence[Sequence[float]]) -> list[int | None]:
    """For each layer of the target, the layer of the source that stands for it.

    No layer is used twice and none overtakes another; of all such ways to pair layers up, the one
    with the largest sum of likenesses (dynamic programming, as in Needleman and Wunsch, J. Mol.
    Biol. 48, 1970, with gaps that cost nothing). Pairs that are not alike at all (0 or less) are
    not made.

    Args:
        likeness: of every target layer (rows) to every source layer.

    Returns:
        An index, or None, for each target layer.

    Example:
        >>> match_depth([[0.9, 0.1], [0.2, 0.1], [0.0, 0.8]])
        [0, None, 1]
    """
    count = len(likeness[0]) if likeness else 0
    best = [[0.0] * (count + 1)]
    for row in likeness:
        above, here = best[-1], [0.0]
        for i, value in enumerate(row):
            here.append(max(above[i + 1], here[i], above[i] + value))
        best.append(here)
    matched: list[int | None] = [None] * len(likeness)
    j, i = len(likeness), count
    while j and i:
        if best[j][i] == best[j - 1][i]:
            j -= 1
        elif best[j][i] == best[j][i - 1]:
            i -= 1
        else:
            j, i = j - 1, i - 1
            matched[j] = i
    return matched
