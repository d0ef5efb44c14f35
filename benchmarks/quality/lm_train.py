# SPDX-License-Identifier: Apache-2.0
"""Training with static shapes: on a GPU one captured graph a step, elsewhere the plain loop."""

import time

import numpy as np
import torch
import torch.nn.functional as F

from .lm_adapters import hook, trained
from .lm_model import EMBEDDING, Rotary, base_linear, causal, head, hidden_states


def clock():
    """Seconds, after the device has caught up."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class Parameters:
    """AdamW over named parameters of several groups, without a value leaving the device.

    All lie in one float32 buffer `(groups, numbers)`, with a copy in the computing dtype whose
    slices are the leaves of the graph: one update is a dozen kernels whatever the layers.
    """

    def __init__(self, groups, shapes, device, dtype, betas=(0.9, 0.99)):
        self.groups, self._betas = groups, betas
        self._spans, at = {}, 0
        for name, shape in shapes.items():
            size = int(np.prod(shape))
            self._spans[name] = (at, at + size, tuple(shape))
            at += -(-size // 64) * 64  # aligned for tensor cores
        self.master = torch.zeros(groups, at, device=device)
        self._m, self._v = torch.zeros_like(self.master), torch.zeros_like(self.master)
        self._t = torch.zeros((), device=device)
        self._live = self.master if dtype == torch.float32 else self.master.to(dtype)
        self.leaves = {
            name: self._live[:, a:b].view(groups, *shape).detach().requires_grad_()
            for name, (a, b, shape) in self._spans.items()
        }
        self._pad = {n: -(-(b - a) // 64) * 64 - (b - a) for n, (a, b, _) in self._spans.items()}

    def set(self, group, name, value):
        """Start value of one parameter of one group; `commit` comes after the last."""
        a, b, _ = self._spans[name]
        self.master[group, a:b] = value.reshape(-1).to(self.master.device)

    def commit(self):
        """Take the values that were set as the start, and forget what was learned."""
        for state in (self._m, self._v, self._t):
            state.zero_()
        if self._live is not self.master:
            self._live.copy_(self.master)

    def values(self):
        """Float32 values by name, `(groups, ...)`, as views."""
        return {
            name: self.master[:, a:b].view(self.groups, *shape)
            for name, (a, b, shape) in self._spans.items()
        }

    def step(self, loss, lr, clip=1.0):
        """One AdamW step on `loss`; `lr` is `(groups, 1)`. Gradients are clipped by group."""
        grads = torch.autograd.grad(loss, list(self.leaves.values()))
        with torch.no_grad():
            flat = []
            for (name, pad), grad in zip(self._pad.items(), grads, strict=True):
                del name
                flat.append(grad.reshape(self.groups, -1))
                if pad:
                    flat.append(grad.new_zeros(self.groups, pad))
            g = torch.cat(flat, 1).float()
            norm = torch.linalg.vector_norm(g, dim=1, keepdim=True)
            g.mul_((clip / (norm + 1e-6)).clamp(max=1.0))
            first, second = self._betas
            self._t.add_(1)
            self._m.mul_(first).add_(g, alpha=1 - first)
            self._v.mul_(second).addcmul_(g, g, value=1 - second)
            bias = (1 - second**self._t).sqrt() / (1 - first**self._t)
            self.master.sub_(lr * bias * self._m / (self._v.sqrt() + 1e-8))
            if self._live is not self.master:
                self._live.copy_(self.master)


def replay(step, feeds, reset, *, on_step=None, is_late=None):
    """Run `step(*buffers)` once for each row of the feeds; returns how many steps were made.

    Args:
        step: reads its arguments only, changes only tensors that outlive it.
        feeds: tensors `(steps, ...)`; row i is what step i is given.
        reset: puts every tensor that `step` changes back to its start.
        on_step: called with the number of steps made.
        is_late: asked every 20 steps; true ends the run.
    """
    steps = feeds[0].shape[0]
    buffers = [feed[0].clone() for feed in feeds]
    if feeds[0].is_cuda:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(*buffers)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(*buffers)
        go = graph.replay
        reset()
    else:

        def go():
            step(*buffers)

    made = 0
    for i in range(steps):
        if is_late is not None and i % 20 == 0 and is_late():
            break
        for buffer, feed in zip(buffers, feeds, strict=True):
            buffer.copy_(feed[i])
        go()
        made = i + 1
        if on_step is not None:
            on_step(made)
    if feeds[0].is_cuda:
        torch.cuda.synchronize()
    return made


def schedule(steps, warm_up=0.05, floor=0.0):
    """Linear warm-up, then linear decay to `floor`; a factor for every step."""
    at = torch.arange(steps).float()
    warm = max(1.0, warm_up * steps)
    decay = floor + (1 - floor) * (steps - at) / steps
    return torch.minimum((at + 1) / warm, decay)


def answer_batches(examples, rows, length):
    """Static feeds of answer-only training.

    Args:
        examples: prompts with answers, none longer than `length`.
        rows: `(steps, groups, batch)` which examples.
        length: row length; padding is on the right.

    Returns:
        ids `(steps, groups * batch, length)`; and of `(steps, groups * answers)`: where in the
        flattened batch a prediction is made, the label, and 1 or 0 for padding.
    """
    steps, groups, batch = rows.shape
    whole = np.zeros((len(examples), length), dtype=np.int64)
    for i, tokens in enumerate(examples.tokens):
        whole[i, : len(tokens)] = tokens
    lengths = np.array([len(t) for t in examples.tokens])
    place = np.arange(length)
    asked = (place >= examples.starts[:, None] - 1) & (place < lengths[:, None] - 1)
    ids = whole[rows]
    asked = asked[rows].reshape(steps, groups, -1)
    most = int(asked.sum(2).max())
    where = np.zeros((steps, groups, most), dtype=np.int64)
    label, real = np.zeros_like(where), np.zeros(where.shape, dtype=np.float32)
    for s in range(steps):
        for g in range(groups):
            at = asked[s, g].nonzero()[0]
            where[s, g] = g * batch * length
            where[s, g, : len(at)] += at
            label[s, g, : len(at)] = ids[s, g].reshape(-1)[at + 1]
            real[s, g, : len(at)] = 1
    flat = [torch.from_numpy(t.reshape(steps, -1)) for t in (where, label, real)]
    return [torch.from_numpy(ids.reshape(steps, groups * batch, length)), *flat]


def draw(count, steps, batch, seed):
    """`(steps, batch)` examples, every one once before any twice."""
    rng = np.random.default_rng(seed)
    need, rows = steps * batch, []
    while sum(map(len, rows)) < need:
        rows.append(rng.permutation(count))
    return np.concatenate(rows)[:need].reshape(steps, batch)


def train_adapters(
    shape, weights, form, examples, *, length, seeds, rates, steps, batch, is_late=None
):
    """Train adapters side by side on one frozen model.

    Args:
        shape: of the model.
        weights: on the device, in the computing dtype.
        form: `Lora` or `LoraX`.
        examples: prompts with answers.
        length: row length.
        seeds: of each adapter: its start and its order of examples.
        rates: peak learning rate of each adapter.
        steps: optimiser steps.
        batch: examples a step and adapter.
        is_late: asked now and then; true ends the training early.

    Returns:
        The adapters, the mean loss of each over the last tenth, steps made, and seconds.
    """
    started = clock()
    table = weights[EMBEDDING]
    device, dtype, groups = table.device, table.dtype, len(seeds)
    parameters = Parameters(groups, form.parameter_shapes(), device, dtype)

    def reset():
        for g, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(seed)
            for name, size in form.parameter_shapes().items():
                parameters.set(g, name, form.start(name, size, generator))
        parameters.commit()

    reset()
    starts = parameters.master.clone()

    def again():
        parameters.master.copy_(starts)
        parameters.commit()

    rows = np.stack([draw(len(examples), steps, batch, seed) for seed in seeds], 1)
    feeds = [feed.to(device) for feed in answer_batches(examples, rows, length)]
    feeds.append((schedule(steps)[:, None, None] * torch.tensor(rates)[None, :, None]).to(device))
    rotary = Rotary(shape, length, device, dtype)
    attend = causal(shape, rotary, length)
    linear = hook(form, weights, parameters.leaves, groups)
    losses = torch.zeros(groups, device=device)

    def step(ids, where, label, real, lr):
        states = hidden_states(shape, weights, ids, linear, attend)
        asked = states.reshape(-1, shape.hidden).index_select(0, where)
        logits = F.linear(asked, head(weights)).float()
        each = F.cross_entropy(logits, label, reduction="none") * real
        loss = each.view(groups, -1).sum(1) / real.view(groups, -1).sum(1)
        parameters.step(loss.sum(), lr)
        losses.copy_(loss.detach())

    tail = []

    def on_step(made):
        if made > steps - max(1, steps // 10):
            tail.append(losses.clone())

    made = replay(step, feeds, again, on_step=on_step, is_late=is_late)
    final = torch.stack(tail).mean(0).tolist() if tail else [float("nan")] * groups
    values = {name: value.clone() for name, value in parameters.values().items()}
    return trained(form, groups, values), final, made, clock() - started


def windows(stream, length, steps, batch, seed):
    """`(steps, batch, length)` token ids: windows of running text, each once before any twice."""
    count = len(stream) // length
    whole = stream[: count * length].reshape(count, length)
    return torch.from_numpy(whole[draw(count, steps, batch, seed)])


def train_model(
    shape, weights, ids, *, rate, snapshots, teacher=None, warm_up=20, decay=False, is_late=None
):
    """Train every weight on running text.

    Args:
        shape: of the model.
        weights: float32, on the device; not changed.
        ids: `(steps, batch, length)`.
        rate: learning rate; constant after a warm-up of `warm_up` steps, or falling to zero.
        snapshots: after how many steps to keep a copy.
        teacher: shape and weights of a model whose next-token distribution is the goal; without
            it the text itself is.
        warm_up: steps.
        decay: let the rate fall linearly.
        is_late: asked now and then; true ends the training early.

    Returns:
        steps -> float32 weights, the losses at the snapshots, and seconds.
    """
    started = clock()
    device = weights[EMBEDDING].device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    parameters = Parameters(1, {n: w.shape for n, w in weights.items()}, device, dtype, (0.9, 0.95))

    def again():
        for name, value in weights.items():
            parameters.set(0, name, value)
        parameters.commit()

    again()
    steps, _, length = ids.shape
    at = torch.arange(steps).float()
    rates = rate * torch.minimum((at + 1) / warm_up, torch.ones(()))
    if decay:
        rates = rates * (steps - at) / steps
    attend = causal(shape, Rotary(shape, length, device, dtype), length)
    loss_now = torch.zeros((), device=device)
    if teacher is not None:
        old_shape, old = teacher
        old = {name: value.to(dtype) for name, value in old.items()}
        old_attend = causal(old_shape, Rotary(old_shape, length, device, dtype), length)

    def step(tokens, lr):
        leaves = {name: leaf.squeeze(0) for name, leaf in parameters.leaves.items()}
        states = hidden_states(shape, leaves, tokens, base_linear(leaves), attend)[:, :-1]
        logits = F.linear(states.reshape(-1, shape.hidden), head(leaves)).float()
        if teacher is None:
            loss = F.cross_entropy(logits, tokens[:, 1:].reshape(-1))
        else:
            with torch.no_grad():
                known = hidden_states(old_shape, old, tokens, base_linear(old), old_attend)[:, :-1]
                known = F.linear(known.reshape(-1, old_shape.hidden), head(old)).float()
                known = known.log_softmax(1)
            loss = (known.exp() * (known - logits.log_softmax(1))).sum(1).mean()
        parameters.step(loss, lr)
        loss_now.copy_(loss.detach())

    kept, losses = {}, {}

    def on_step(made):
        if made in snapshots:
            kept[made] = {name: value[0].clone() for name, value in parameters.values().items()}
            losses[made] = loss_now.item()

    replay(
        step,
        [ids.to(device), rates.view(-1, 1, 1).to(device)],
        again,
        on_step=on_step,
        is_late=is_late,
    )
    return kept, losses, clock() - started
