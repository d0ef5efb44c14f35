# SPDX-License-Identifier: Apache-2.0
"""What `lorax-transfer scan` would measure of a pair and an adapter, from tensors in memory."""

import torch

import lorax_kernels as lk

from .lm_model import EMBEDDING


def _energy(B, A):
    return ((B.mT.double() @ B.double()) * (A.double() @ A.double().mT)).sum()


def totals(pair, adapter, rank):
    """The totals that `lorax_transfer.recommend` reads, weighted by the energy of each update."""
    source, target = pair.source.bases(rank), pair.target.bases(rank)
    columns = {n: [] for n in ("weight", "drift", "similarity", "chance", "excess", "in", "in_c")}
    for name, (B, A) in adapter.factors.items():
        W_s, W_t = pair.source.matrix(name), pair.target.matrix(name)
        s, t = source[name], target[name]
        overlap = lk.subspace_similarity(s, t)
        told = [
            (phi - chance) / (1 - chance)
            for phi, chance in ((overlap.U, overlap.chance_U), (overlap.V, overlap.chance_V))
            if chance < 1
        ]
        whole = _energy(B, A)
        by_U = overlap.U <= overlap.V
        row = {
            "weight": whole,
            "drift": (W_t - W_s).norm() / W_s.norm(),
            "similarity": overlap.U if by_U else overlap.V,
            "chance": overlap.chance_U if by_U else overlap.chance_V,
            "excess": min(told) if told else None,
            "in": _energy(t.U.mT @ B, A @ t.V) / whole,
            "in_c": overlap.chance_U * overlap.chance_V,
        }
        for key, value in row.items():
            columns[key].append(None if value is None else float(value))

    def mean(key):
        pairs = [(w, x) for w, x in zip(columns["weight"], columns[key], strict=True)]
        pairs = [(w, x) for w, x in pairs if x is not None]
        return sum(w * x for w, x in pairs) / sum(w for w, _ in pairs) if pairs else None

    count = len(adapter.factors)
    adapted = {f"{name}.weight" for name in adapter.factors}
    return {
        "layers": count,
        "transferred": 0,
        "left_out": 0,
        "excluded": 0,
        "unvalidated": 0,
        "above_tolerance": 0,
        "energy_written": None,
        "drift": mean("drift"),
        "drift_max": max(columns["drift"]),
        "similarity": mean("similarity"),
        "chance": mean("chance"),
        "similarity_excess": mean("excess"),
        "in_subspace": mean("in"),
        "in_subspace_chance": mean("in_c"),
        "embedding_drift": moved_by(pair, [EMBEDDING]),
        "untouched_drift": moved_by(pair, pair.source.weights.keys() - adapted - {EMBEDDING}),
    }


def moved_by(pair, names):
    """`||W_t - W_s|| / ||W_s||` of some weights, taken together."""
    source, target = (
        torch.cat([m.weights[n].flatten() for n in sorted(names)])
        for m in (pair.source, pair.target)
    )
    return float((target - source).norm() / source.norm())


def embedding_drift(pair, key):
    """`W_t - W_s` of the embeddings: relative size, and the energy of its leading directions."""
    D = (pair.target.weights[key] - pair.source.weights[key]).double()
    size = float(D.norm() / pair.source.weights[key].double().norm())
    if not size:
        return {"drift": 0.0, "energy": {}}
    values = torch.linalg.eigvalsh(D.mT @ D).flip(0).clamp(min=0)
    share = (values.cumsum(0) / values.sum()).tolist()
    return {"drift": size, "energy": {q: share[q - 1] for q in (1, 4, 16) if q <= len(share)}}
