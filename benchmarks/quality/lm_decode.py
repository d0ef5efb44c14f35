# SPDX-License-Identifier: Apache-2.0
"""Greedy answers to a batch of prompts, over a static cache."""

import numpy as np
import torch
import torch.nn.functional as F

from .lm_data import END
from .lm_model import (
    EMBEDDING,
    FINAL_NORM,
    Rotary,
    base_linear,
    captured,
    causal,
    head,
    hidden_states,
)


class Decoder:
    """Greedy decoding of one batch of prompts, padded on the right.

    All prompts go side by side whatever their lengths: each has its own place in the cache. On a
    GPU a step is one graph, in which layers that read the same are one product, and the host looks
    only every eighth step whether all rows have ended.

    Args:
        owner: an `Evaluator`; whatever it has loaded writes the answers.
        examples: prompts; their answers are not read.
        most: tokens of an answer.
    """

    def __init__(self, owner, examples, most):
        shape, device, dtype = owner.shape, owner.device, owner.dtype
        self._owner, self._most = owner, most
        prompts = [row[:start] for row, start in zip(examples.tokens, examples.starts, strict=True)]
        rows = len(prompts)
        self._lengths = torch.tensor([len(p) for p in prompts], device=device)
        self._width = int(self._lengths.max())
        self._room = -(-(self._width + most) // 8) * 8
        ids = np.zeros((rows, self._width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
        self._ids = torch.from_numpy(ids).to(device)
        self._rows = torch.arange(rows, device=device)
        cache = (rows, shape.kv_heads, self._room, shape.head_dim)
        self._keys = [torch.zeros(cache, device=device, dtype=dtype) for _ in range(shape.layers)]
        self._values = [torch.zeros_like(k) for k in self._keys]
        self._heads = torch.arange(rows * shape.kv_heads, device=device) * self._room
        self._rotary = Rotary(shape, self._room, device, dtype)
        self._token = torch.zeros(rows, dtype=torch.long, device=device)
        self._place = self._lengths.clone()
        self._slots = torch.arange(self._room, device=device)
        self._begin = captured(self._prefill, device)
        self._go = captured(self._step, device)

    def _next(self, states):
        self._token.copy_(F.linear(states, head(self._owner.weights)).argmax(1))

    def _prefill(self):
        shape, weights = self._owner.shape, self._owner.weights

        def keep(i, k, v):
            self._keys[i][:, :, : self._width].copy_(k.transpose(1, 2))
            self._values[i][:, :, : self._width].copy_(v.transpose(1, 2))

        attend = causal(shape, self._rotary, self._width, keep)
        states = hidden_states(shape, weights, self._ids, base_linear(weights), attend)
        self._next(states[self._rows, self._lengths - 1])
        self._place.copy_(self._lengths)

    def _step(self):
        """Read the last token at its place, write the next one."""
        shape, weights, rotary = self._owner.shape, self._owner.weights, self._rotary
        joined = self._owner.joined
        rows, e = len(self._rows), shape.head_dim
        times = shape.heads // shape.kv_heads
        cos, sin = (t[self._place][:, None] for t in (rotary.cos, rotary.sin))
        ahead = self._slots > self._place[:, None]
        bias = torch.zeros(ahead.shape, device=ahead.device, dtype=self._owner.dtype)
        bias = bias.masked_fill(ahead, float("-inf")).repeat_interleave(shape.kv_heads, 0)[:, None]
        bias = bias.expand(-1, times, -1)
        # Where each row's and head's new key goes, in a cache of rows.
        slots = self._heads + self._place.repeat_interleave(shape.kv_heads)

        x = weights[EMBEDDING].index_select(0, self._token)
        for i in range(shape.layers):
            name = f"model.layers.{i}"
            h = self._norm(x, f"{name}.input_layernorm.weight")
            key = f"{name}.self_attn.qkv"
            h = F.linear(h, joined[f"{key}.weight"], joined.get(f"{key}.bias")).view(rows, -1, e)
            turned = rotary(h[:, : shape.heads + shape.kv_heads], cos, sin)
            q, k = turned.split([shape.heads, shape.kv_heads], 1)
            v = h[:, shape.heads + shape.kv_heads :]
            for cache, new in ((self._keys[i], k), (self._values[i], v)):
                cache.view(-1, e).index_copy_(0, slots, new.reshape(-1, e))
            q = q.reshape(rows * shape.kv_heads, times, e)
            k, v = (t.view(len(q), self._room, e) for t in (self._keys[i], self._values[i]))
            scores = torch.baddbmm(bias, q, k.mT, alpha=e**-0.5)
            mixed = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
            x = torch.addmm(x, mixed.view(rows, -1), weights[f"{name}.self_attn.o_proj.weight"].mT)
            h = self._norm(x, f"{name}.post_attention_layernorm.weight")
            gate, up = F.linear(h, joined[f"{name}.mlp.gate_up.weight"]).chunk(2, 1)
            down = weights[f"{name}.mlp.down_proj.weight"]
            x = torch.addmm(x, F.silu(gate) * up, down.mT)
        self._next(self._norm(x, FINAL_NORM))
        self._place.add_(1)

    def _norm(self, x, name):
        shape = self._owner.shape
        return F.rms_norm(x, (shape.hidden,), self._owner.weights[name], shape.eps)

    def __call__(self):
        """The answers, each up to its end mark."""
        self._begin()
        out = torch.full((len(self._rows), self._most), END, device=self._token.device)
        for t in range(self._most):
            out[:, t] = self._token
            if t == self._most - 1 or (t % 8 == 7 and bool((out[:, : t + 1] == END).any(1).all())):
                break
            self._go()
        return [row[: row.index(END)] if END in row else row for row in out.tolist()]
