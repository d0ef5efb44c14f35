# SPDX-License-Identifier: Apache-2.0
"""Training of the text-to-image model and of its adapters, many runs at a time.

Steps of a model this small are too short to fill a GPU, and launching their kernels takes longer
than running them. So a step is captured as a CUDA graph, and the graphs of several runs are
replayed side by side, each on its own stream.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.quality.image_model import Weights, noised, velocity

SLOTS = 16  # batches drawn at a time
PROBE = (16, 48)  # the steps between which the time of one is taken
UNCAPTIONED = 0.1  # share of the batch without its caption, which guidance needs


@dataclass(frozen=True)
class Data:
    """Pictures and captions of a run: `(n, 3, side, side)` and `(n, tokens, width)`."""

    images: torch.Tensor
    text: torch.Tensor


@dataclass(frozen=True)
class Schedule:
    """Steps, examples a step, and the largest learning rate: warmed up, then a cosine to zero.

    Attributes:
        seconds: what `train` may take; fewer steps are made where that is not enough.
    """

    steps: int
    batch: int
    lr: float
    warmup: int = 50
    seconds: float = math.inf

    def rate(self, step: int) -> float:
        """The learning rate of one step."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps))


class Run:
    """One training run.

    Args:
        unet: the structure.
        parameters: what is trained, changed in place; leaf tensors in float32.
        realise: all weights of the U-Net, in the dtype of the computation, from `parameters`.
        data: pictures and captions.
        schedule: steps, batch and learning rate.
        seed: of the batches, noise and times.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        parameters: dict[str, torch.Tensor],
        realise: Callable[[Weights], Weights],
        data: Data,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self.unet, self.parameters, self.realise = unet, parameters, realise
        self.data, self.schedule = data, schedule
        self.device = data.images.device
        self.on_gpu = self.device.type == "cuda"
        for value in parameters.values():
            value.requires_grad_(True)
        rate = torch.zeros((), device=self.device) if self.on_gpu else 0.0
        self.optimizer = torch.optim.AdamW(
            parameters.values(), lr=rate, weight_decay=0.0, fused=True, capturable=self.on_gpu
        )
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.done = 0
        shape = (SLOTS, schedule.batch)
        self.rows = torch.zeros(shape, dtype=torch.long, device=self.device)
        self.times = torch.zeros(shape, device=self.device)
        self.captioned = torch.zeros(shape, device=self.device)
        self.noise = torch.zeros(*shape, *data.images.shape[1:], device=self.device)
        self.slot = torch.zeros(1, dtype=torch.long, device=self.device)
        self.loss = torch.zeros((), device=self.device)

    def _draw(self) -> None:
        """Fill the slots; outside the graph, because graphs on several streams share one state."""
        self.rows.random_(0, len(self.data.images), generator=self.generator)
        self.times.normal_(generator=self.generator).sigmoid_()
        self.captioned.uniform_(generator=self.generator)
        self.noise.normal_(generator=self.generator)
        self.slot.zero_()

    def _step(self) -> None:
        rows, t, kept, noise = (
            buffer.index_select(0, self.slot).squeeze(0)
            for buffer in (self.rows, self.times, self.captioned, self.noise)
        )
        self.slot.add_(1)
        image = self.data.images.index_select(0, rows)
        text = self.data.text.index_select(0, rows) * (kept >= UNCAPTIONED)[:, None, None]
        out = velocity(self.unet, self.realise(self.parameters), noised(image, noise, t), t, text)
        loss = (out - (noise - image)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.loss.lerp_(loss.detach(), 0.02)

    def _set_rate(self) -> None:
        rate = self.schedule.rate(self.done)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def advance(self) -> None:
        """One step, queued on this run's stream where there is a GPU."""
        if self.done >= self.schedule.steps:
            return
        with torch.cuda.stream(self.stream):
            if self.done % SLOTS == 0:
                self._draw()
            self._set_rate()
            # The first steps are made eagerly: they allocate what the graph then reuses.
            if not self.on_gpu or self.done < 3:
                self.optimizer.zero_grad(set_to_none=True)
                self._step()
            else:
                if self.graph is None:
                    self.graph = self._capture()
                self.graph.replay()
        self.done += 1

    def _capture(self) -> torch.cuda.CUDAGraph:
        self.optimizer.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        return graph

    def result(self) -> dict[str, torch.Tensor]:
        """The trained parameters, detached."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}


def train(runs: Sequence[Run], label: str, say: Callable[[str], None]) -> float:
    """Advance all runs to their ends, interleaved; returns the seconds that took.

    Runs with a limit of seconds are of equal length. After a few steps it is known how many fit.
    """
    start = time.perf_counter()
    wait(runs)
    length, step, probe = max(run.schedule.steps for run in runs), 0, 0.0
    while step < length:
        if step in PROBE:
            wait(runs)
            now = time.perf_counter()
            if step == PROBE[1]:
                length = fitted(runs, start, (now - probe) / (PROBE[1] - PROBE[0]))
            probe = now
        for run in runs:
            run.advance()
        step += 1
        if step % SLOTS == 0:
            # A bounded queue: the host must not run minutes ahead of the GPU.
            wait(runs)
        if step == 1 or step % max(1, length // 8) == 0 or step == length:
            losses = " ".join(f"{run.loss.item():.4f}" for run in runs[:8])
            say(f"{label} {step}/{length} loss {losses}")
    wait(runs)
    return time.perf_counter() - start


def wait(runs: Sequence[Run]) -> None:
    """Let the queued steps end."""
    if runs[0].on_gpu:
        torch.cuda.synchronize()


def fitted(runs: Sequence[Run], start: float, each: float) -> int:
    """Shorten the runs to what fits into their seconds, at `each` a step; the steps of the longest.

    No run ends within its warm-up.
    """
    left = min(run.schedule.seconds for run in runs) - (time.perf_counter() - start)
    for run in runs:
        schedule = run.schedule
        if left < each * (schedule.steps - PROBE[1]):
            steps = max(PROBE[1] + int(left / each), 2 * schedule.warmup)
            run.schedule = replace(schedule, steps=min(steps, schedule.steps))
    return max(run.schedule.steps for run in runs)
