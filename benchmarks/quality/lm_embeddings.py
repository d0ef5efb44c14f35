# SPDX-License-Identifier: Apache-2.0
"""Ways to give a target a part of the source's embeddings back, beside an update of its layers.

A part is called as `part(pair, adapter) -> factors` of the drift of the embeddings, or of what is
to be taken back of it.
"""

import torch

from .lm_model import EMBEDDING, HEAD

INPUT, OUTPUT = (name.removesuffix(".weight") for name in (EMBEDDING, HEAD))
READERS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def _drift(pair):
    return pair.target.weights[EMBEDDING] - pair.source.weights[EMBEDDING]


def whole(pair, adapter):
    """All of the drift."""
    del adapter
    D = _drift(pair)
    return D, torch.eye(D.shape[1], device=D.device)


def leading(pair, adapter, *, directions):
    """Its leading directions, which an adapter of that rank can hold."""
    del adapter
    D = _drift(pair)
    squares = D.double().mT @ D.double()
    V = torch.linalg.eigh(squares).eigenvectors[:, -directions:].to(D.dtype)
    return D @ V, V.mT


def met(pair, adapter, *, directions, is_written=True):
    """The drift in the directions that the update writes into the stream, or reads from it."""
    D = _drift(pair)
    squares = torch.zeros(D.shape[1], D.shape[1], dtype=torch.float64, device=D.device)
    for name, (B, A) in adapter.factors.items():
        if name.endswith(READERS) == is_written:
            continue
        left, right = (B.double(), A.double()) if is_written else (A.mT.double(), B.mT.double())
        squares += left @ (right @ right.mT) @ left.mT
    V = torch.linalg.eigh(squares).eigenvectors[:, -directions:].to(D.dtype)
    return D @ V, V.mT


def rows(pair, adapter, *, count):
    """The drift of the tokens that moved most; an adapter can hold such rows."""
    D, eye = whole(pair, adapter)
    kept = torch.zeros_like(D[:, 0])
    kept[D.norm(dim=1).topk(min(count, len(D))).indices] = 1
    return D * kept[:, None], eye


def untaught(pair, adapter, *, share):
    """The drift of the tokens that moved with all others alone: the target did not train on them.

    Of a step on tied embeddings every row has a part, the tokens that are not in the text the same
    one: away from what the model reads there.
    """
    D, eye = whole(pair, adapter)
    shared = D.median(0).values
    own = (D - shared).norm(dim=1)
    kept = own <= own.quantile(share)
    return D * kept[:, None], eye


def beside(pair, adapter, *, layers, part, strength=1.0, sides=(INPUT, OUTPUT)):
    """A method for the layers, and a share of a part of the embeddings' drift taken back."""
    moved = dict(layers(pair, adapter))
    B, A = part(pair, adapter)
    return moved | dict.fromkeys(sides, (-strength * B, A))
