# SPDX-License-Identifier: Apache-2.0
"""Scores of a model with an adapter merged in: loss on answers and text, and greedy answers.

On a GPU every pass is captured once and replayed for whatever was loaded since.
"""

import numpy as np
import torch
import torch.nn.functional as F

from .lm_decode import Decoder
from .lm_model import (
    ATTENTION,
    EMBEDDING,
    HEAD,
    MLP,
    Rotary,
    base_linear,
    captured,
    causal,
    head,
    hidden_states,
)

# Layers that read the same: their weights lie one behind another, to be read as one.
TOGETHER = {"self_attn.qkv": ATTENTION[:3], "mlp.gate_up": MLP[:2]}


class Evaluator:
    """One set of weights in the computing dtype, into which models and adapters are loaded."""

    def __init__(self, shape, weights, *, chunk=None):
        """Hold `weights` (float32, on the device) of `shape`; `chunk` rows a forward pass."""
        self.shape = shape
        self.device = weights[EMBEDDING].device
        on_gpu = self.device.type == "cuda"
        self.dtype = torch.bfloat16 if on_gpu else torch.float32
        # The output matrix has a place of its own: an update of tied embeddings may reach one side.
        whole = {HEAD: head(weights), **weights}
        self.weights = {name: value.to(self.dtype, copy=True) for name, value in whole.items()}
        self.joined = self._join()
        self._base = weights
        self._chunk = chunk or (512 if on_gpu else 50)
        self._passes, self._decoders = {}, {}

    def _join(self):
        """Weights and biases of `TOGETHER`, of which those of the layers become views."""
        joined = {}
        for i in range(self.shape.layers):
            for group, parts in TOGETHER.items():
                folder = group.split(".")[0]
                for end in ("weight", "bias"):
                    names = [f"model.layers.{i}.{folder}.{part}.{end}" for part in parts]
                    if names[0] not in self.weights:
                        continue
                    whole = torch.cat([self.weights[name] for name in names])
                    joined[f"model.layers.{i}.{group}.{end}"] = whole
                    sizes = [len(self.weights[name]) for name in names]
                    self.weights |= dict(zip(names, whole.split(sizes), strict=True))
        return joined

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

        def rows():
            ids = np.zeros((len(examples), length), dtype=np.int64)
            asked = np.zeros(ids.shape, dtype=bool)
            for i, (row, start) in enumerate(zip(examples.tokens, examples.starts, strict=True)):
                ids[i, : len(row)] = row
                asked[i, start - 1 : len(row) - 1] = True
            return ids, asked

        return self._loss(("answers", id(examples), length), rows, examples)

    @torch.no_grad()
    def text_loss(self, stream, length=128, rows=64):
        """Mean loss on running text: `rows` windows of `length` tokens."""

        def windows():
            count = min(rows, len(stream) // length)
            ids = stream[: count * length].reshape(count, length)
            asked = np.ones(ids.shape, dtype=bool)
            asked[:, -1] = False
            return ids, asked

        return self._loss(("text", id(stream), length, rows), windows, stream)

    def _loss(self, key, rows, owner):
        if key not in self._passes:
            ids, asked = rows()
            parts = range(0, len(ids), self._chunk)
            chunks = [(ids[i : i + self._chunk], asked[i : i + self._chunk]) for i in parts]
            # The owner of the key's id() is kept, so that no other object takes the id.
            self._passes[key] = owner, [_Loss(self, *chunk) for chunk in chunks]
        _, passes = self._passes[key]
        return sum(one() for one in passes) / sum(one.count for one in passes)

    @torch.no_grad()
    def answers(self, examples, most):
        """Greedy answers of at most `most` tokens: a list of rows of token ids."""
        key = (id(examples), most)
        if key not in self._decoders:
            self._decoders[key] = examples, Decoder(self, examples, most)
        return self._decoders[key][1]()


class _Loss:
    """The summed loss of some places of a batch."""

    def __init__(self, owner, ids, asked):
        shape, device = owner.shape, owner.device
        where = asked.reshape(-1).nonzero()[0]
        self.count = len(where)
        labels = torch.from_numpy(ids.reshape(-1)[where + 1]).to(device)
        where = torch.from_numpy(where).to(device)
        tokens = torch.from_numpy(ids).to(device)
        length = ids.shape[1]
        attend = causal(shape, Rotary(shape, length, device, owner.dtype), length)
        linear = base_linear(owner.weights)
        self._total = total = torch.zeros((), device=device)

        def run():
            states = hidden_states(shape, owner.weights, tokens, linear, attend)
            states = states.reshape(-1, shape.hidden)[where]
            logits = F.linear(states, head(owner.weights)).float()
            total.copy_(F.cross_entropy(logits, labels, reduction="sum"))

        self._go = captured(run, device)

    def __call__(self):
        self._go()
        return self._total.item()
