# SPDX-License-Identifier: Apache-2.0
"""What is said of a model with or without an adapter: losses, and scores of what it draws."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import torch

from benchmarks.quality import image_adapters, image_model
from benchmarks.quality.image_adapters import Checkpoint, Factors
from benchmarks.quality.image_data import Emoji
from benchmarks.quality.image_score import Scorer
from benchmarks.quality.image_sizes import Size

PICTURES = 16  # kept of each method, for the contact sheet


class Evaluation:
    """Scores models of one shape by drawings of one style.

    Args:
        unet: the structure of the models.
        emoji: the drawings.
        size: how much is scored.
        source: any of the models.
        style: the style that adapters are for.
        say: prints progress.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        emoji: Emoji,
        size: Size,
        source: Checkpoint,
        style: str,
        say: Callable[[str], None],
    ) -> None:
        self.unet, self.emoji, self.size, self.style = unet, emoji, size, style
        device = emoji.images.device
        self.captions = torch.arange(len(emoji.indices("test")), device=device)[: size.captions]
        self.pictures: dict[str, np.ndarray] = {}
        # Half precision, but not bfloat16: that rounds weights by as much as a near target drifts.
        self.dtype = torch.float16 if device.type == "cuda" else torch.float32
        self.predict = self._predictor(source)
        if not math.isfinite(self.loss(source, {}, "tune")):
            say("float16 overflows in this model: scored in float32")
            self.dtype = torch.float32
            self.predict = self._predictor(source)
        start = time.perf_counter()
        self.scorer = Scorer(emoji, style, size.judge_steps, size.judge_width)
        self.seconds = time.perf_counter() - start
        say(f"a judge, in {self.seconds:.1f} s")
        test = emoji.indices("test")
        everything = torch.arange(len(test), device=device)
        self.real = {}
        for name in emoji.styles:
            self.real[name] = asdict(self.scorer(emoji.style(name)[test], everything))
            self._keep(f"real {name}", emoji.style(name)[test][:PICTURES])
        say(f"real pictures: {self.real}")

    def _predictor(self, source: Checkpoint) -> image_model.Predictor:
        weights = image_adapters.merge(source.weights, {}, self.dtype)
        shape = tuple(self.emoji.text.shape[1:])
        return image_model.Predictor(self.unet, weights, self.size.batch, shape)

    def _keep(self, name: str, images: torch.Tensor) -> None:
        bytes_ = ((images + 1) * 127.5).round().clamp(0, 255).byte()
        self.pictures[name] = bytes_.permute(0, 2, 3, 1).cpu().numpy()

    def _load(self, base: Checkpoint, factors: Factors) -> None:
        self.predict.load(image_adapters.merge(base.weights, factors, self.dtype))

    def _loss(self, role: str) -> float:
        """The denoising loss of what is loaded."""
        rows = self.emoji.indices(role)
        images, text = self.emoji.style(self.style)[rows], self.emoji.text[rows]
        draws = self.size.draws
        return image_model.denoising_loss(self.predict, images, text, draws, seed=7)

    def loss(self, base: Checkpoint, factors: Factors, role: str) -> float:
        """Denoising loss on the drawings with this role, in the adapters' style."""
        self._load(base, factors)
        return self._loss(role)

    def __call__(self, base: Checkpoint, factors: Factors, seed: int, name: str) -> dict:
        """All scores; the first seed's pictures are kept under a name."""
        self._load(base, factors)
        found = {"loss": self._loss("test"), "loss_new": self._loss("new")}
        text = self.emoji.text[self.emoji.indices("test")[self.captions]]
        steps = self.size.sample_steps
        images = image_model.sample(self.predict, text, steps=steps, guidance=2.0, seed=seed)
        if seed == self.size.seeds[0]:
            self._keep(name, images[:PICTURES])
        return found | asdict(self.scorer(images, self.captions))
