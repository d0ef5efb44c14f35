# SPDX-License-Identifier: Apache-2.0
"""A small random model and a larger one that computes the same, with a task to learn.

What a transfer between sizes can do at best: the larger model holds the smaller one's stream in
directions of its own, has more hidden units and one more layer, and no coordinate in common.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from . import lm_data
from .lm_model import ATTENTION, EMBEDDING, FINAL_NORM, HEAD, MLP, Shape, random_model
from .sizes_pack import Writer

SMALL = Shape(
    vocab=61, hidden=48, layers=3, heads=6, kv_heads=2, ffn=80, head_dim=8, theta=1e6, eps=1e-6
)
LARGE = {"hidden": 80, "ffn": 128}
ROWS = {"train": 256, "valid": 32, "test": 32}


def random_qwen(shape, seed=0):
    """Random weights, with biases of queries, keys and values, and an output matrix of its own."""
    weights = random_model(shape, seed)
    g = torch.Generator().manual_seed(seed + 1)
    for i in range(shape.layers):
        for part in ATTENTION[:3]:
            name = f"model.layers.{i}.self_attn.{part}"
            weights[f"{name}.bias"] = 0.3 * torch.randn(len(weights[f"{name}.weight"]), generator=g)
    weights[HEAD] = 0.3 * torch.randn(weights[EMBEDDING].shape, generator=g)
    return weights


def larger(shape, weights, hidden, ffn, seed=0):
    """A model that computes the same in a wider stream, wider MLPs and one more layer."""
    g = torch.Generator().manual_seed(seed + 2)
    P = torch.linalg.qr(torch.randn(hidden, shape.hidden, generator=g)).Q
    units = torch.randperm(ffn, generator=g)[: shape.ffn]
    # The root mean square of a vector falls as zeros join it.
    gain = (shape.hidden / hidden) ** 0.5
    made = replace(shape, hidden=hidden, ffn=ffn, layers=shape.layers + 1)
    idle = shape.layers // 2 + 1  # the layer that adds nothing
    out = {
        EMBEDDING: weights[EMBEDDING] @ P.mT,
        HEAD: (weights[HEAD] * weights[FINAL_NORM]) @ P.mT,
        FINAL_NORM: torch.full((hidden,), gain),
    }
    for j in range(made.layers):
        old, new = f"model.layers.{j - (j >= idle)}", f"model.layers.{j}"
        attention, mlp = (
            weights[f"{old}.{norm}.weight"]
            for norm in ("input_layernorm", "post_attention_layernorm")
        )
        for part in ATTENTION[:3]:
            name = f"self_attn.{part}"
            out[f"{new}.{name}.weight"] = (weights[f"{old}.{name}.weight"] * attention) @ P.mT
            out[f"{new}.{name}.bias"] = weights[f"{old}.{name}.bias"]
        out[f"{new}.self_attn.o_proj.weight"] = P @ weights[f"{old}.self_attn.o_proj.weight"]
        for part in MLP[:2]:
            W = torch.zeros(ffn, hidden)
            W[units] = (weights[f"{old}.mlp.{part}.weight"] * mlp) @ P.mT
            out[f"{new}.mlp.{part}.weight"] = W
        W = torch.zeros(hidden, ffn)
        W[:, units] = P @ weights[f"{old}.mlp.down_proj.weight"]
        out[f"{new}.mlp.down_proj.weight"] = W
        if j == idle:
            out[f"{new}.self_attn.o_proj.weight"].zero_()
            W.zero_()
        for norm in ("input_layernorm", "post_attention_layernorm"):
            out[f"{new}.{norm}.weight"] = torch.full((hidden,), gain)
    return made, out


def reversals(vocab):
    """Split -> rows of a prompt and itself reversed; every prompt begins with the same two."""
    rng, rows = np.random.default_rng(0), {}
    for split, count in ROWS.items():
        rows[split] = []
        for _ in range(count):
            some = rng.integers(5, vocab, rng.integers(3, 6)).tolist()
            rows[split].append(([3, 4, *some], [*some[::-1], lm_data.END], str(some[::-1])))
    return rows


def reduced_folder(folder):
    """Write what `sizes_data.prepare` writes, of the random pair, in one folder."""
    from tokenizers import Tokenizer, decoders, models

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    small = random_qwen(SMALL)
    writer = Writer(folder)
    for label, (shape, weights) in {
        "small": (SMALL, small),
        "large": larger(SMALL, small, **LARGE),
    }.items():
        writer.model(label, shape, list(weights), weights.__getitem__, lambda name: 0.05)
    writer.close()
    for path in (folder / "00").iterdir():
        path.replace(folder / path.name)
    (folder / "00").rmdir()
    arrays, references = {}, {}
    for split, rows in reversals(SMALL.vocab).items():
        arrays |= lm_data._pack(rows, f"enfr.{split}")
        references[f"enfr.{split}"] = [text for _, _, text in rows]
    np.savez_compressed(folder / "data.npz", **arrays)
    (folder / "references.json").write_text(json.dumps(references))
    names = {f"w{i}": i for i in range(SMALL.vocab)}
    tokenizer = Tokenizer(models.WordLevel(names, unk_token="w0"))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
