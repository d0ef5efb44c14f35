# SPDX-License-Identifier: Apache-2.0
"""Scores of a model with an adapter merged in: loss on answers and text, and greedy answers."""

import numpy as np
import torch
import torch.nn.functional as F

from .lm_data import END
from .lm_model import EMBEDDING, HEAD, Rotary, base_linear, causal, head, hidden_states, layer


class Evaluator:
    """One set of weights in the computing dtype, into which models and adapters are loaded.

    A captured decoding step reads the same memory whatever was loaded, so it is captured once a
    shape and task.
    """

    def __init__(self, shape, weights, *, chunk=None):
        """Hold `weights` (float32, on the device) of `shape`; `chunk` rows a forward pass."""
        self.shape = shape
        self.device = weights[EMBEDDING].device
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        # The output matrix has a place of its own: an update of tied embeddings may reach one side.
        whole = {HEAD: head(weights), **weights}
        self.weights = {name: value.to(self.dtype, copy=True) for name, value in whole.items()}
        self._base = weights
        self._chunk = chunk or (512 if on_gpu else 50)
        self._decoders = {}

    def load(self, weights=None, factors=None):
        """Take another model of the same shape, or add the update `B A` of every layer."""
        if weights is not None:
            self._base = weights
        for name in self.weights:
            value = head(self._base) if name == HEAD else self._base[name]
            layer_name = name.removesuffix(".weight")
            if factors is not None and layer_name in factors:
                B, A = factors[layer_name]
                value = torch.addmm(value, B.float(), A.float())
            self.weights[name].copy_(value)

    @torch.no_grad()
    def answer_loss(self, examples, length):
        """Mean loss over all answer tokens, teacher-forced."""
        attend = causal(self.shape, self._rotary(length), length)
        total, count = 0.0, 0
        for first in range(0, len(examples), self._chunk):
            tokens = examples.tokens[first : first + self._chunk]
            starts = examples.starts[first : first + self._chunk]
            ids = np.zeros((len(tokens), length), dtype=np.int64)
            asked = np.zeros(ids.shape, dtype=bool)
            for i, (row, start) in enumerate(zip(tokens, starts, strict=True)):
                ids[i, : len(row)] = row
                asked[i, start - 1 : len(row) - 1] = True
            where = asked.reshape(-1).nonzero()[0]
            label = torch.from_numpy(ids.reshape(-1)[where + 1]).to(self.device)
            states = hidden_states(
                self.shape,
                self.weights,
                torch.from_numpy(ids).to(self.device),
                base_linear(self.weights),
                attend,
            ).reshape(-1, self.shape.hidden)
            states = states[torch.from_numpy(where).to(self.device)]
            logits = F.linear(states, head(self.weights)).float()
            total += F.cross_entropy(logits, label, reduction="sum").item()
            count += len(where)
        return total / count

    @torch.no_grad()
    def text_loss(self, stream, length=128, rows=64):
        """Mean loss on running text: `rows` windows of `length` tokens."""
        rows = min(rows, len(stream) // length)
        ids = torch.from_numpy(stream[: rows * length].reshape(rows, length)).to(self.device)
        attend = causal(self.shape, self._rotary(length), length)
        total = 0.0
        for part in ids.split(self._chunk):
            states = hidden_states(
                self.shape, self.weights, part, base_linear(self.weights), attend
            )[:, :-1]
            logits = F.linear(states.reshape(-1, self.shape.hidden), head(self.weights)).float()
            total += F.cross_entropy(logits, part[:, 1:].reshape(-1), reduction="sum").item()
        return total / (rows * (length - 1))

    @torch.no_grad()
    def answers(self, examples, most):
        """Greedy answers of at most `most` tokens: a list of rows of token ids."""
        key = (id(examples), most)
        if key not in self._decoders:
            self._decoders[key] = _Decoder(self, examples, most)
        return self._decoders[key]()

    def _rotary(self, length):
        return Rotary(self.shape, length, self.device, self.dtype)


class _Decoder:
    """Greedy decoding of one batch of prompts, padded on the right, over a static cache."""

    def __init__(self, owner, examples, most):
        shape, device, dtype = owner.shape, owner.device, owner.dtype
        self._owner, self._most, self._examples = owner, most, examples  # keeps id() its own
        prompts = [row[:start] for row, start in zip(examples.tokens, examples.starts, strict=True)]
        self._lengths = torch.tensor([len(p) for p in prompts], device=device)
        self._width = int(self._lengths.max())
        self._room = -(-(self._width + most) // 8) * 8
        ids = np.zeros((len(prompts), self._width), dtype=np.int64)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt)] = prompt
        self._ids = torch.from_numpy(ids).to(device)
        self._all = torch.arange(len(prompts), device=device)
        cache = (len(prompts), shape.kv_heads, self._room, shape.head_dim)
        self._keys = [torch.zeros(cache, device=device, dtype=dtype) for _ in range(shape.layers)]
        self._values = [torch.zeros_like(k) for k in self._keys]
        self._rotary = Rotary(shape, self._room, device, dtype)
        self._token = torch.zeros(len(prompts), dtype=torch.long, device=device)
        self._place = self._lengths.clone()
        self._slots = torch.arange(self._room, device=device)
        self._go = self._step
        if device.type == "cuda":
            self._prefill()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(2):
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._step()
            self._go = graph.replay

    def _next(self, states):
        self._token.copy_(F.linear(states, head(self._owner.weights)).argmax(1))

    def _prefill(self):
        shape, weights = self._owner.shape, self._owner.weights

        def keep(i, k, v):
            self._keys[i][:, :, : self._width].copy_(k.transpose(1, 2))
            self._values[i][:, :, : self._width].copy_(v.transpose(1, 2))

        attend = causal(shape, self._rotary, self._width, keep)
        states = hidden_states(shape, weights, self._ids, base_linear(weights), attend)
        self._next(states[self._all, self._lengths - 1])
        self._place.copy_(self._lengths)

    def _step(self):
        """Read the last token at its place, write the next one."""
        shape, weights, rotary = self._owner.shape, self._owner.weights, self._rotary
        times = shape.heads // shape.kv_heads
        rows = len(self._all)
        cos, sin = (t[self._place][:, None, None] for t in (rotary.cos, rotary.sin))
        ahead = self._slots > self._place[:, None]
        bias = torch.zeros(ahead.shape, device=ahead.device, dtype=self._owner.dtype)
        bias = bias.masked_fill(ahead, float("-inf")).repeat_interleave(shape.kv_heads, 0)[:, None]
        bias = bias.expand(-1, times, -1)

        def attend(i, q, k, v):
            q, k = rotary(q, cos, sin), rotary(k, cos, sin)
            self._keys[i][self._all, :, self._place] = k[:, 0]
            self._values[i][self._all, :, self._place] = v[:, 0]
            q = q.reshape(rows * shape.kv_heads, times, shape.head_dim)
            k, v = (t.view(q.shape[0], self._room, -1) for t in (self._keys[i], self._values[i]))
            scores = torch.baddbmm(bias, q, k.mT, alpha=shape.head_dim**-0.5)
            mixed = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
            return mixed.view(rows, 1, shape.heads, shape.head_dim)

        x = weights[EMBEDDING].index_select(0, self._token)[:, None]
        linear = base_linear(weights)
        for i in range(shape.layers):
            x = layer(shape, weights, i, x, linear, attend)
        states = F.rms_norm(x[:, 0], (shape.hidden,), weights["model.norm.weight"], shape.eps)
        self._next(states)
        self._place.add_(1)

    def __call__(self):
        self._prefill()
        out = torch.full((len(self._all), self._most), END, device=self._token.device)
        for t in range(self._most):
            out[:, t] = self._token
            if t == self._most - 1 or (t % 8 == 7 and bool((out[:, : t + 1] == END).any(1).all())):
                break
            self._go()
        return [self._cut(row) for row in out.tolist()]

    @staticmethod
    def _cut(row):
        return row[: row.index(END)] if END in row else row
