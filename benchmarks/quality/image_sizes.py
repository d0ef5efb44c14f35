# SPDX-License-Identifier: Apache-2.0
"""How large the text-to-image measurement is: one for a GPU, one for two cores, one for tests."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.image_training import Schedule


@dataclass(frozen=True)
class Size:
    """How large the model is and how long everything trains."""

    side: int
    channels: tuple[int, ...]
    layers: int
    rank: int
    base: Schedule
    targets: dict[str, Schedule]
    lora: Schedule
    lorax: Schedule
    seeds: int
    judge_steps: int
    judge_width: int
    draws: int
    captions: int
    sample_steps: int
    batch: int


SIZES = {
    "full": Size(
        side=32,
        channels=(64, 128, 128),
        layers=1,
        rank=8,
        base=Schedule(steps=8000, batch=128, lr=1e-3, warmup=200),
        targets={
            "near": Schedule(steps=100, batch=128, lr=1e-4),
            "mid": Schedule(steps=500, batch=128, lr=2e-4),
            "far": Schedule(steps=2500, batch=128, lr=5e-4),
        },
        lora=Schedule(steps=1000, batch=64, lr=2e-3),
        lorax=Schedule(steps=1000, batch=64, lr=5e-3),
        seeds=3,
        judge_steps=800,
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
        base=Schedule(steps=300, batch=32, lr=3e-3),
        targets={
            "near": Schedule(steps=20, batch=32, lr=3e-4, warmup=5),
            "far": Schedule(steps=100, batch=32, lr=2e-3, warmup=10),
        },
        lora=Schedule(steps=60, batch=32, lr=1e-2, warmup=10),
        lorax=Schedule(steps=60, batch=32, lr=1e-2, warmup=10),
        seeds=1,
        judge_steps=100,
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
        lora=Schedule(steps=6, batch=8, lr=2e-2, warmup=2),
        lorax=Schedule(steps=6, batch=8, lr=2e-2, warmup=2),
        seeds=2,
        judge_steps=2,
        judge_width=8,
        draws=1,
        captions=4,
        sample_steps=1,
        batch=64,
    ),
}
