# SPDX-License-Identifier: Apache-2.0
"""How large the text-to-image measurement is: one for a GPU, one for two cores, one for tests."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.image_training import Schedule


@dataclass(frozen=True)
class Size:
    """How large the model is and how long everything trains.

    Attributes:
        base: training of the source.
        targets: training that makes the targets of it, in order of importance.
        adapter: training of an adapter, of either kind; the rate is one of `rates`.
        rates: learning rates of each kind of adapter.
        tuning: steps after which the best of several rates is chosen.
        seeds: of adapters; source and targets are the same for all.
    """

    side: int
    channels: tuple[int, ...]
    layers: int
    rank: int
    base: Schedule
    targets: dict[str, Schedule]
    adapter: Schedule
    rates: dict[str, tuple[float, ...]]
    tuning: int
    seeds: tuple[int, ...]
    judge_steps: int
    judge_width: int
    draws: int
    captions: int
    sample_steps: int
    batch: int


SIZES = {
    "full": Size(
        side=32,
        channels=(96, 128),
        layers=1,
        rank=8,
        base=Schedule(steps=8000, batch=128, lr=1e-3, warmup=200, seconds=55),
        targets={
            "near": Schedule(steps=100, batch=128, lr=1e-4),
            "far": Schedule(steps=1200, batch=128, lr=5e-4),
            "mid": Schedule(steps=400, batch=128, lr=2e-4),
        },
        # One size of batch, because the choice of kernels for another takes seconds.
        adapter=Schedule(steps=500, batch=128, lr=0.0, seconds=18),
        rates={"lora": (1e-3, 2e-3, 4e-3, 8e-3), "lorax": (1e-3, 3e-3, 1e-2, 3e-2)},
        tuning=200,
        seeds=(0, 1, 2),
        judge_steps=500,
        judge_width=64,
        draws=8,
        captions=128,
        sample_steps=20,
        batch=256,
    ),
    "reduced": Size(
        side=16,
        channels=(16, 32),
        layers=1,
        rank=4,
        base=Schedule(steps=300, batch=32, lr=3e-3, seconds=60),
        targets={
            "near": Schedule(steps=20, batch=32, lr=3e-4, warmup=5),
            "far": Schedule(steps=100, batch=32, lr=2e-3, warmup=10, seconds=20),
        },
        adapter=Schedule(steps=100, batch=32, lr=0.0, warmup=10, seconds=40),
        rates={"lora": (1e-2,), "lorax": (1e-2,)},
        tuning=0,
        seeds=(0,),
        judge_steps=40,
        judge_width=16,
        draws=2,
        captions=16,
        sample_steps=6,
        batch=128,
    ),
    "tiny": Size(
        side=8,
        channels=(8, 16),
        layers=1,
        rank=2,
        base=Schedule(steps=12, batch=8, lr=1e-2, warmup=2),
        targets={"near": Schedule(steps=5, batch=8, lr=3e-3, warmup=2)},
        adapter=Schedule(steps=6, batch=8, lr=0.0, warmup=2),
        rates={"lora": (1e-6, 2e-2), "lorax": (2e-2,)},
        tuning=4,
        seeds=(0, 1),
        judge_steps=2,
        judge_width=8,
        draws=1,
        captions=4,
        sample_steps=1,
        batch=16,
    ),
}
