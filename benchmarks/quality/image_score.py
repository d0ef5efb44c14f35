# SPDX-License-Identifier: Apache-2.0
"""Scores of generated pictures: drawn in the style, and of the thing that the caption names.

A small network looks at real emoji in four styles. One head names the style; the other gives two
drawings of one thing in different styles the same direction, so that content is recognised whatever
the style. It never sees a picture that an adapter is scored on. Its features also serve for the
kernel distance (KID): unlike the Frechet distance that is unbiased at a few hundred pictures.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.quality.image_data import Emoji


class Judge(nn.Module):
    """Convolutions, a mean over positions, and two heads."""

    def __init__(self, styles: int, width: int) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs, stride in (
            (3, width, 1),
            (width, 2 * width, 2),
            (2 * width, 4 * width, 2),
            (4 * width, 4 * width, 2),
        ):
            blocks += [
                nn.Conv2d(inputs, outputs, 3, stride, 1),
                nn.GroupNorm(8, outputs),
                nn.SiLU(),
            ]
        self.blocks = nn.Sequential(*blocks)
        self.style = nn.Linear(4 * width, styles)
        self.content = nn.Linear(4 * width * 16, 128)
        self.place = nn.AdaptiveAvgPool2d(4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Features `(b, 4 width)`, logits of the styles, and directions of the content."""
        maps = self.blocks(x)
        features = maps.mean((2, 3))
        content = F.normalize(self.content(self.place(maps).flatten(1)), dim=1)
        return features, self.style(features), content


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifted by up to two pixels, brighter or darker, noisy: what a generated picture may be."""
    count, device = len(images), images.device
    moved = torch.randint(-2, 3, (2,), generator=generator, device=device).tolist()
    padded = F.pad(images, (2, 2, 2, 2), value=1.0)
    side = images.shape[-1]
    top, left = 2 + moved[0], 2 + moved[1]
    images = padded[:, :, top : top + side, left : left + side]
    gain = 1 + 0.2 * torch.randn(count, 1, 1, 1, generator=generator, device=device)
    level = 0.15 * torch.rand(count, 1, 1, 1, generator=generator, device=device)
    noise = torch.randn(images.shape, generator=generator, device=device)
    return (1 - (1 - images) * gain + level * noise).clamp(-1, 1)


@dataclass(frozen=True)
class Scores:
    """What is said of a set of pictures, one for each caption.

    Attributes:
        style: mean probability of the wanted style.
        content: share whose nearest real thing, among the test captions, is the one asked for.
        content5: share with it among the nearest five.
        kid: kernel distance to the real pictures of the style, times 1000; 0 is the same.
    """

    style: float
    content: float
    content5: float
    kid: float


class Scorer:
    """The judge, trained, and what it compares with."""

    def __init__(self, emoji: Emoji, style: str, steps: int, width: int, seed: int = 0) -> None:
        device = emoji.images.device
        self.wanted = emoji.styles.index(style)
        self.test = emoji.indices("test")
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            self.judge = Judge(len(emoji.styles), width).to(device)
        generator = torch.Generator(device).manual_seed(seed)
        optimizer = torch.optim.AdamW(self.judge.parameters(), lr=2e-3, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        # Held out: the wanted style of every name that the adapter is not trained on.
        free = torch.ones(len(emoji.styles), len(emoji.names), dtype=torch.bool, device=device)
        free[self.wanted, emoji.indices("tune", "test", "new")] = False
        for _ in range(steps):
            names = torch.randperm(len(emoji.names), generator=generator, device=device)[:192]
            order = torch.rand(free.shape, generator=generator, device=device) + ~free * 10.0
            pair = order[:, names].argsort(0)[:2]
            images = emoji.images[pair, names].flatten(0, 1)
            _, style_logits, content = self.judge(augment(images, generator))
            left, right = content.chunk(2)
            logits = left @ right.mT / 0.1
            labels = torch.arange(len(names), device=device)
            loss = F.cross_entropy(style_logits, pair.flatten())
            loss = loss + F.cross_entropy(logits, labels) + F.cross_entropy(logits.mT, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
        self.judge.requires_grad_(False)
        others = [i for i in range(len(emoji.styles)) if i != self.wanted]
        views = [self.judge(emoji.images[i, self.test])[2] for i in others]
        self.gallery = F.normalize(torch.stack(views).mean(0), dim=1)
        self.real = self.judge(emoji.images[self.wanted, self.test])[0].double()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor, rows: torch.Tensor) -> Scores:
        """Score pictures of the test captions at positions `rows` of the test set."""
        features, logits, content = self.judge(images)
        probability = logits.softmax(1)[:, self.wanted].mean().item()
        nearest = (content @ self.gallery.mT).topk(5, dim=1).indices == rows[:, None]
        return Scores(
            style=probability,
            content=nearest[:, 0].double().mean().item(),
            content5=nearest.any(1).double().mean().item(),
            kid=1000 * kernel_distance(features.double(), self.real),
        )


def kernel_distance(x: torch.Tensor, y: torch.Tensor) -> float:
    """Squared maximum mean discrepancy, unbiased, with the cubic kernel of KID."""
    scale = y.std(0) + 1e-6
    x, y = x / scale, y / scale

    def kernel(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    def between(a: torch.Tensor) -> torch.Tensor:
        values = kernel(a, a)
        return (values.sum() - values.diagonal().sum()) / (len(a) * (len(a) - 1))

    return (between(x) + between(y) - 2 * kernel(x, y).mean()).item()
