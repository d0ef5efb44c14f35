# SPDX-License-Identifier: Apache-2.0
"""Adapters between two sizes of a family, by maps fitted to what both models make of one text.

Weights alone say how two models' streams correspond only as far as their tables of tokens do. A
text that both read, which may be one that a model wrote itself, says it at every layer: positions
are the common things, and maps are least squares. No method here trains on answers or takes a
gradient, and the adapter stays of the rank that it had.
"""

import warnings
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

import lorax_kernels as lk

from . import lm_shapes
from .lm_data import Examples
from .lm_model import ATTENTION, EMBEDDING, FINAL_NORM, MLP, Rotary, Shape, causal, head
from .lm_model import hidden_states as run
from .lm_train import answer_batches

RIDGE = 1e-2  # of the mean square of an input


def depth(j, count, other):
    """The layer of `other` layers that ends at the share of depth where layer j of `count` does."""
    return min(other - 1, max(0, round((j + 1) * other / count) - 1))


def linear_of(weights, factors=None):
    """The hook of a model with an update beside its weights, in the dtype of the weights."""
    factors = factors or {}

    def linear(name, x):
        out = F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        if name in factors:
            B, A = (f.to(x.dtype) for f in factors[name])
            out = out + (x @ A.mT) @ B.mT
        return out

    return linear


class Text:
    """Rows of token ids that both models read, and what they make of it.

    Args:
        ids: `(rows, length)`.
        keep: `(rows, length)` of bool, the positions that count.
    """

    def __init__(self, ids, keep=None):
        self.ids = ids
        keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep
        self.places = keep.reshape(-1).nonzero().squeeze(1)

    def _attend(self, shape, weights):
        table, length = weights[EMBEDDING], self.ids.shape[1]
        return causal(shape, Rotary(shape, length, table.device, table.dtype), length)

    def pick(self, x):
        """The positions that count, float32 `(places, width)`."""
        return x.reshape(-1, x.shape[-1]).index_select(0, self.places).float()

    @torch.no_grad()
    def streams(self, shape, weights, factors=None):
        """The residual stream after every layer."""
        out = []
        attend, linear = self._attend(shape, weights), linear_of(weights, factors)
        run(shape, weights, self.ids, linear, attend, lambda i, x: out.append(self.pick(x)))
        return out

    @torch.no_grad()
    def each(self, shape, weights, see, factors=None):
        """Run a model; `see(name, x, y)` is shown the input and output of every linear layer."""
        plain = linear_of(weights, factors)

        def linear(name, x):
            y = plain(name, x)
            see(name, x, y)
            return y

        run(shape, weights, self.ids, linear, self._attend(shape, weights))


@torch.no_grad()
def write_text(shape, weights, starts, length, *, factors=None, seed=0):
    """Continue rows of tokens by drawing from a model; `starts` is `(rows, some)`."""
    generator = torch.Generator(starts.device).manual_seed(seed)
    dtype = weights[EMBEDDING].dtype
    ids, linear = starts, linear_of(weights, factors)
    rotary = Rotary(shape, length, starts.device, dtype)
    while ids.shape[1] < length:
        attend = causal(shape, rotary, ids.shape[1])
        last = run(shape, weights, ids, linear, attend)[:, -1]
        chances = F.linear(last, head(weights)).float().softmax(1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], 1)
    return ids


def ridge(X, Y, strength=RIDGE):
    """`W` `(n, m)` that minimises `||X W - Y||^2 + c ||W||^2`, by whichever Gram is smaller."""
    rows, n = X.shape
    small = strength * X.square().mean() * rows
    if rows < n:
        gram = X @ X.mT
        gram.diagonal().add_(small)
        return X.mT @ torch.cholesky_solve(Y, torch.linalg.cholesky(gram))
    gram = X.mT @ X
    gram.diagonal().add_(small)
    return torch.cholesky_solve(X.mT @ Y, torch.linalg.cholesky(gram))


def low_rank(X, Y, rank, strength=RIDGE):
    """The `B` `(m, r)`, `A` `(r, n)` for which `X A^T B^T` is closest to `Y`, with the same ridge.

    Reduced-rank regression (Izenman, J. Multivariate Anal. 5, 1975).
    """
    W = ridge(X, Y, strength)
    seen = (Y.mT @ X @ W).double()
    values, vectors = torch.linalg.eigh((seen + seen.mT) / 2)
    del values
    V = vectors[:, -rank:].float()
    return V, (W @ V).mT.contiguous()


def explained(X, Y, W):
    """Share of the energy of Y that `X W` has."""
    return float(1 - (Y - X @ W).square().sum() / Y.square().sum())


@dataclass(frozen=True)
class Reading:
    """Two models in the computing dtype, and the text that both read."""

    source: Shape
    target: Shape
    old: dict
    new: dict
    text: Text

    def opposite(self, j):
        """The source's layer for layer j of the target."""
        return depth(j, self.target.layers, self.source.layers)

    def name(self, module):
        """The source's module for one of the target."""
        j, part = lm_shapes._split(module)
        return f"model.layers.{self.opposite(j)}.{part}"


def reading(pair, text, dtype):
    """A pair of models that read a text."""
    old, new = (
        {name: value.to(dtype) for name, value in model.weights.items()}
        for model in (pair.source, pair.target)
    )
    return Reading(pair.source.shape, pair.target.shape, old, new, text)


def _stream_maps(both, streams_old, streams_new):
    """For every layer of the target the map `(d_s, d_t)` of the stream behind it."""
    return [ridge(streams_old[both.opposite(j)], new) for j, new in enumerate(streams_new)]


def _is_writer(module):
    return module.endswith(("o_proj", "down_proj"))


@torch.no_grad()
def fitted(both, adapter, *, parts=(*ATTENTION, *MLP)):
    """Every update through maps of its layer's outputs there and of its inputs back.

    `dW_t = R dW_s Q`: Q tells the source's input from the target's, R the target's output from the
    source's. For a writer R is the map of the stream behind the layer.
    """
    text, read, out = both.text, {}, {}
    streams = text.streams(both.source, both.old), text.streams(both.target, both.new)
    maps = _stream_maps(both, *streams)

    def see_old(name, x, y):
        if name.endswith(parts):
            A = adapter.factors[name][1]
            read[name] = text.pick(x) @ A.mT, None if _is_writer(name) else text.pick(y)

    def see_new(name, x, y):
        if not name.endswith(parts):
            return
        old = both.name(name)
        thin, y_old = read[old]
        B = adapter.factors[old][0]
        across = maps[lm_shapes._split(name)[0]] if y_old is None else ridge(y_old, text.pick(y))
        out[name] = across.mT @ B, ridge(text.pick(x), thin).mT.contiguous()

    text.each(both.source, both.old, see_old)
    text.each(both.target, both.new, see_new)
    return out


@torch.no_grad()
def followed(both, adapter, *, rank, strength=1.0):
    """What the adapter does to the source's stream, made by the target's own MLPs.

    Behind each layer the change of the source's stream is carried over by a map of the streams; the
    update of the layer's `down_proj` is the one of this rank that best adds what is still missing,
    after all that the layers below have made of their updates.
    """
    text, out, state = both.text, {}, {}
    before = text.streams(both.source, both.old)
    after = text.streams(both.source, both.old, adapter.factors)
    base = text.streams(both.target, both.new)
    maps = _stream_maps(both, before, base)
    goals = []
    for j, (stream, across) in enumerate(zip(base, maps, strict=True)):
        i = both.opposite(j)
        goals.append(stream + strength * (after[i] - before[i]) @ across)
    del before, after, base, maps
    plain = linear_of(both.new)

    def linear(name, x):
        y = plain(name, x)
        if name.endswith("o_proj"):
            state["middle"] = state["stream"] + y
        if name.endswith("down_proj"):
            missing = goals[lm_shapes._split(name)[0]] - text.pick(state["middle"] + y)
            B, A = out[name] = low_rank(text.pick(x), missing, rank)
            y = y + (x @ A.mT.to(x.dtype)) @ B.mT.to(x.dtype)
        return y

    def watch(i, x):
        del i
        state["stream"] = x

    state["stream"] = both.new[EMBEDDING][text.ids]
    run(both.target, both.new, text.ids, linear, text._attend(both.target, both.new), watch)
    return out


def padded(pair, adapter):
    """Coordinates copied one by one, the rest zero or left out: a control."""
    out = {}
    for name in pair.target.shape.module_names():
        j, part = lm_shapes._split(name)
        i = depth(j, pair.target.shape.layers, pair.source.shape.layers)
        B, A = adapter.factors[f"model.layers.{i}.{part}"]
        m, n = pair.target.matrix(name).shape
        out[name] = (
            F.pad(B[:m], (0, 0, 0, max(0, m - len(B)))),
            F.pad(A[:, :n], (0, max(0, n - A.shape[1]))),
        )
    return out


def projected(pair, adapter, *, rank):
    """LoRA-X's transfer as published for unequal shapes, layers at the same share of the depth."""
    source, target = pair.source.bases(rank), pair.target.bases(rank)
    names = pair.target.shape.module_names()
    old = []
    for name in names:
        j, part = lm_shapes._split(name)
        i = depth(j, pair.target.shape.layers, pair.source.shape.layers)
        old.append(f"model.layers.{i}.{part}")
    B, A = (list(x) for x in zip(*(adapter.factors[n] for n in old), strict=True))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lk.UnvalidatedTransferWarning)
        moved = lk.transfer_lora(B, A, [target[n] for n in names], [source[n] for n in old])
    return {n: (b, a) for n, b, a in zip(names, *moved, strict=True)}


def maps_of_both_tables(source, target, maps):
    """`lm_shapes.find_maps` again, with a stream map from embeddings and output matrices."""
    tables = []
    for model in (source, target):
        E, U = model.weights[EMBEDDING], head(model.weights) * model.weights[FINAL_NORM]
        tables.append(torch.cat([E / E.norm(), U / U.norm()]))
    stream = lk.procrustes(*tables)
    inner = lm_shapes._inner_maps(source, target, stream, maps.layers)
    return replace(maps, stream=stream, inner=inner)


@torch.no_grad()
def proxy_loss(both, adapter, examples, length, chunk=100):
    """Loss of the target with the source's change of its logits added: three models, a control.

    Proxy tuning (Liu et al., COLM 2024, arXiv 2401.08565): what the source knows of the task, with
    no update of the target at all.
    """
    total, count, device = 0.0, 0, both.text.ids.device
    for first in range(0, len(examples), chunk):
        part = Examples(
            examples.tokens[first : first + chunk], examples.starts[first : first + chunk]
        )
        rows = np.arange(len(part)).reshape(1, 1, -1)
        ids, where, label, real = (x[0].to(device) for x in answer_batches(part, rows, length))
        logits = 0.0
        for shape, weights, factors, sign in (
            (both.target, both.new, None, 1),
            (both.source, both.old, adapter.factors, 1),
            (both.source, both.old, None, -1),
        ):
            states = run(
                shape, weights, ids, linear_of(weights, factors), Text(ids)._attend(shape, weights)
            )
            asked = states.reshape(-1, shape.hidden).index_select(0, where)
            logits = logits + sign * F.linear(asked, head(weights)).float().log_softmax(1)
        losses = F.cross_entropy(logits, label, reduction="none") * real
        total, count = total + losses.sum().item(), count + real.sum().item()
    return total / count
