# SPDX-License-Identifier: Apache-2.0
"""Smaller copies of a model: fewer layers, or a narrower residual stream and MLP.

Pruned only; `train_model` with the original as teacher heals them.
"""

from dataclasses import replace

import torch

from .lm_model import ATTENTION, EMBEDDING, FINAL_NORM, HEAD, Rotary, base_linear, causal, head
from .lm_model import hidden_states as run


def _passes(shape, weights, ids, watch_layer=None, linear=None):
    length = ids.shape[1]
    table = weights[EMBEDDING]
    attend = causal(shape, Rotary(shape, length, table.device, table.dtype), length)
    run(shape, weights, ids, linear or base_linear(weights), attend, watch_layer)


@torch.no_grad()
def prune_depth(shape, weights, ids, drop):
    """Leave out the `drop` layers that change the residual stream least (never the two ends).

    Args:
        shape: of the model.
        weights: float32.
        ids: `(rows, length)` of calibration text.
        drop: how many layers.

    Returns:
        Shape, weights, and which layers were kept.
    """
    streams = [weights[EMBEDDING][ids]]
    change = []

    def watch(i, x):
        del i
        similarity = torch.nn.functional.cosine_similarity(streams[0].float(), x.float(), dim=-1)
        change.append(1 - similarity.mean().item())
        streams[0] = x

    _passes(shape, weights, ids, watch)
    middle = sorted(range(1, shape.layers - 1), key=lambda i: change[i])
    kept = [i for i in range(shape.layers) if i not in set(middle[:drop])]
    out = {n: w.clone() for n, w in weights.items() if ".layers." not in n}
    for new, old in enumerate(kept):
        prefix = f"model.layers.{old}."
        for name, value in weights.items():
            if name.startswith(prefix):
                out[f"model.layers.{new}.{name.removeprefix(prefix)}"] = value.clone()
    return replace(shape, layers=len(kept)), out, kept


@torch.no_grad()
def prune_width(shape, weights, ids, hidden, ffn):
    """Keep the leading principal directions of the residual stream, and the MLP's busiest units.

    Norm gains are folded into the layers that read them, after which the stream can be rotated
    (Ashkboos et al., SliceGPT, ICLR 2024); one rotation for the whole model.

    Args:
        shape: of the model.
        weights: float32.
        ids: `(rows, length)` of calibration text.
        hidden: width to keep.
        ffn: MLP units to keep.

    Returns:
        Shape and weights; the output matrix is no longer the embedding.
    """
    covariance = torch.zeros(shape.hidden, shape.hidden, device=ids.device, dtype=torch.float64)

    def add(x):
        unit = torch.nn.functional.normalize(x.reshape(-1, shape.hidden).double(), dim=1)
        covariance.add_(unit.T @ unit)

    busy = {}

    def linear(name, x):
        if name.endswith("down_proj"):
            column = weights[f"{name}.weight"].norm(dim=0)
            busy[name] = x.reshape(-1, shape.ffn).float().square().mean(0).sqrt() * column
        return torch.nn.functional.linear(x, weights[f"{name}.weight"])

    add(weights[EMBEDDING][ids])
    _passes(shape, weights, ids, lambda i, x: add(x), linear)
    values, vectors = torch.linalg.eigh(covariance)
    del values
    Q = vectors.flip(1)[:, :hidden].to(weights[EMBEDDING].dtype)

    gain = torch.full((hidden,), (shape.hidden / hidden) ** 0.5, device=ids.device)
    out = {
        EMBEDDING: weights[EMBEDDING] @ Q,
        HEAD: (head(weights) * weights[FINAL_NORM]) @ Q,
        FINAL_NORM: gain.clone(),
    }
    for i in range(shape.layers):
        name = f"model.layers.{i}"
        before, after = (
            weights[f"{name}.{norm}.weight"]
            for norm in ("input_layernorm", "post_attention_layernorm")
        )
        for part in ATTENTION[:3]:
            key = f"{name}.self_attn.{part}.weight"
            out[key] = (weights[key] * before) @ Q
        key = f"{name}.self_attn.o_proj.weight"
        out[key] = Q.T @ weights[key]
        units = busy[f"{name}.mlp.down_proj"].topk(ffn).indices.sort().values
        for part in ("gate_proj", "up_proj"):
            key = f"{name}.mlp.{part}.weight"
            out[key] = (weights[key][units] * after) @ Q
        key = f"{name}.mlp.down_proj.weight"
        out[key] = Q.T @ weights[key][:, units]
        out[f"{name}.input_layernorm.weight"] = gain.clone()
        out[f"{name}.post_attention_layernorm.weight"] = gain.clone()
    return replace(shape, hidden=hidden, ffn=ffn), {n: w.contiguous() for n, w in out.items()}
