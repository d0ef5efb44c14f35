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
from .lm_data import END, Examples
from .lm_model import ATTENTION, EMBEDDING, FINAL_NORM, MLP, Rotary, Shape, causal, head
from .lm_model import hidden_states as run
from .lm_train import answer_batches

STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the ridge


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
        keep: `(rows, length)` of bool, the positions that count. The first of a row never does:
            large models keep nothing there but a few huge numbers.
    """

    def __init__(self, ids, keep=None):
        self.ids = ids
        keep = torch.ones_like(ids, dtype=torch.bool) if keep is None else keep.clone()
        keep[:, 0] = False
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


class Ridge:
    """`W` `(n, m)` that minimises `||X W - Y||^2 + c ||W||^2`, by whichever Gram matrix is smaller.

    `c` is a share of the mean square of X: the one of `STRENGTHS` that predicts the last fifth of
    the positions best from the others. In float64, where GPUs of data centres lose nothing by it.

    Args:
        X: `(positions, n)`.
        Y: `(positions, m)`.
        strengths: the shares to choose from.
    """

    def __init__(self, X, Y, strengths=STRENGTHS):
        self._X, self._Y = X.double(), Y.double()
        self.strength = strengths[0]
        if len(strengths) > 1:
            known = len(X) - max(1, len(X) // 5)
            # Some columns tell as much as all.
            probe = self._Y[:, :: -(-Y.shape[1] // 64)]
            gram = self._gram(self._X[:known])
            errors = []
            for strength in strengths:
                factor = self._factor(gram, self._X[:known], strength)
                W = self._weights(factor, self._X[:known], probe[:known])
                errors.append(float((self._X[known:] @ W - probe[known:]).square().sum()))
            self.strength = strengths[errors.index(min(errors))]
        self._chosen = self._factor(self._gram(self._X), self._X, self.strength)

    @staticmethod
    def _gram(X):
        return X @ X.mT if len(X) < X.shape[1] else X.mT @ X

    @staticmethod
    def _factor(gram, X, strength):
        gram = gram.clone()
        gram.diagonal().add_(strength * X.square().mean() * len(X))
        return torch.linalg.cholesky(gram)

    @staticmethod
    def _weights(factor, X, Y):
        if len(X) < X.shape[1]:
            return X.mT @ torch.cholesky_solve(Y, factor)
        return torch.cholesky_solve(X.mT @ Y, factor)

    def weights(self):
        """`W` itself, float64."""
        return self._weights(self._chosen, self._X, self._Y)

    def carry(self, B):
        """`W^T B` for `B` `(n, r)`, without forming W; float32."""
        B, X = B.double(), self._X
        if len(X) < X.shape[1]:
            moved = self._Y.mT @ torch.cholesky_solve(X @ B, self._chosen)
        else:
            moved = self._Y.mT @ (X @ torch.cholesky_solve(B, self._chosen))
        return moved.float()

    def low_rank(self, rank):
        """`B` `(m, r)`, `A` `(r, n)` with `A^T B^T` the best W of this rank, float32.

        Reduced-rank regression (Izenman, J. Multivariate Anal. 5, 1975).
        """
        W = self.weights()
        seen = self._Y.mT @ (self._X @ W)
        V = torch.linalg.eigh((seen + seen.mT) / 2).eigenvectors[:, -rank:]
        return V.float(), (W @ V).mT.float().contiguous()


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
    """For every layer of the target the ridge of its stream on the source's behind it."""
    return [Ridge(streams_old[both.opposite(j)], new) for j, new in enumerate(streams_new)]


def _is_writer(module):
    return module.endswith(("o_proj", "down_proj"))


@torch.no_grad()
def fitted(both, adapters, *, parts=(*ATTENTION, *MLP)):
    """Every update through maps of its layer's outputs there and of its inputs back.

    `dW_t = R dW_s Q`: Q tells the source's input from the target's, R the target's output from the
    source's. For a writer R is the map of the stream behind the layer. Of several adapters at once,
    which share the maps; a list of factors comes back, and the strengths that were chosen.
    """
    text, read, chosen = both.text, {}, {}
    out = [{} for _ in adapters]
    streams = text.streams(both.source, both.old), text.streams(both.target, both.new)
    maps = _stream_maps(both, *streams)

    def see_old(name, x, y):
        if name.endswith(parts):
            A = torch.cat([adapter.factors[name][1] for adapter in adapters])
            read[name] = text.pick(x) @ A.mT, None if _is_writer(name) else text.pick(y)

    def see_new(name, x, y):
        if not name.endswith(parts):
            return
        thin, y_old = read[both.name(name)]
        across = Ridge(y_old, text.pick(y)) if y_old is not None else None
        across = across or maps[lm_shapes._split(name)[0]]
        back = Ridge(text.pick(x), thin)
        chosen[name] = across.strength, back.strength
        B = [adapter.factors[both.name(name)][0] for adapter in adapters]
        ranks = [b.shape[1] for b in B]
        B = across.carry(torch.cat(B, 1)).split(ranks, 1)
        A = back.weights().mT.float().split(ranks)
        for factors, b, a in zip(out, B, A, strict=True):
            factors[name] = b.contiguous(), a.contiguous()

    text.each(both.source, both.old, see_old)
    text.each(both.target, both.new, see_new)
    return out, chosen


def _final(shape, weights, stream):
    """The final norm of a float32 stream."""
    return F.rms_norm(stream, (shape.hidden,), weights[FINAL_NORM].float(), shape.eps)


def logit_map(both):
    """`(d_t, d_s)`: the final states of the target whose logits are closest to those of a source's.

    Least squares over the vocabulary, with what all logits share left out. No text is needed.
    """
    tables = []
    for weights in (both.old, both.new):
        U = head(weights).double()
        tables.append(U - U.mean(0))
    old, new = tables
    gram = new.mT @ new
    gram.diagonal().add_(1e-6 * gram.diagonal().mean())
    return torch.cholesky_solve(new.mT @ old, torch.linalg.cholesky(gram)).float()


@torch.no_grad()
def followed(both, adapter, *, rank):
    """What the adapter does to the source's stream, made by the target's own MLPs.

    Behind each layer the change of the source's stream is carried over by a map of the streams; the
    update of the layer's `down_proj` is the one of this rank that best adds what is still missing,
    after all that the layers below have made of their updates. Two sets of factors come back: in
    the second the last layer is to change the logits as the source's were changed, instead of the
    stream.
    """
    text, out, last, state = both.text, {}, {}, {}
    before = text.streams(both.source, both.old)
    after = text.streams(both.source, both.old, adapter.factors)
    base = text.streams(both.target, both.new)
    goals = []
    for j, (stream, across) in enumerate(zip(base, _stream_maps(both, before, base), strict=True)):
        i = both.opposite(j)
        goals.append(stream + across.carry((after[i] - before[i]).mT).mT)
    states = (_final(both.source, both.old, x[-1]) for x in (after, before))
    change = (next(states) - next(states)) @ logit_map(both).mT
    wanted = _final(both.target, both.new, base[-1]) + change
    gain = both.new[FINAL_NORM].float()
    floor = 0.05 * gain.square().mean().sqrt()
    gain = torch.where(gain.abs() < floor, torch.where(gain < 0, -floor, floor), gain)
    wanted = wanted / gain
    del before, after, base
    plain = linear_of(both.new)

    def linear(name, x):
        y = plain(name, x)
        if name.endswith("o_proj"):
            state["middle"] = state["stream"] + y
        if name.endswith("down_proj"):
            j, now = lm_shapes._split(name)[0], text.pick(state["middle"] + y)
            if j == both.target.layers - 1:
                # The norm that follows makes any scale the same.
                goal = wanted * now.square().mean(1, keepdim=True).sqrt()
                # Errors count as they do behind the norm.
                B, A = Ridge(text.pick(x), (goal - now) * gain).low_rank(rank)
                last[name] = B / gain[:, None], A
            B, A = out[name] = Ridge(text.pick(x), goals[j] - now).low_rank(rank)
            y = y + (x @ A.mT.to(x.dtype)) @ B.mT.to(x.dtype)
        return y

    def watch(i, x):
        del i
        state["stream"] = x

    state["stream"] = both.new[EMBEDDING][text.ids]
    run(both.target, both.new, text.ids, linear, text._attend(both.target, both.new), watch)
    return out, out | last


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
    """Losses of the target with the source's change of its logits added: three models, a control.

    Of all of the answers, and of their words, without the end mark.

    Proxy tuning (Liu et al., COLM 2024, arXiv 2401.08565): what the source knows of the task, with
    no update of the target at all.
    """
    device = both.text.ids.device
    sums = {"nll": 0.0, "words_nll": 0.0}
    counts = dict.fromkeys(sums, 0.0)
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
        losses = F.cross_entropy(logits, label, reduction="none")
        for name, weight in (("nll", real), ("words_nll", real * (label != END))):
            sums[name] += (losses * weight).sum().item()
            counts[name] += weight.sum().item()
    return {name: total / counts[name] for name, total in sums.items()}
