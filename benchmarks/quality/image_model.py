# SPDX-License-Identifier: Apache-2.0
"""A small text-to-image model: a diffusers U-Net trained by flow matching, as functions of weights.

The module holds no weights of its own while it runs: every call names them, so that one U-Net
serves a source, its targets and every adapter, and an adapter costs nothing at inference.

It sees a picture as patches of 2 x 2 pixels, twelve numbers each, at a quarter of the cost: most
of the time of a U-Net of this size goes into its finest resolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch.func import functional_call

from benchmarks.quality.image_data import WIDTH

Weights = Mapping[str, torch.Tensor]

PATCH = 2
VARIANCE = 0.25  # of the pixels of a drawing, about the mean drawing

# Blocks of the U-Net that adapters reach: what they leave out maps pixels, and times, to features.
ADAPTED = ("down_blocks.", "mid_block.", "up_blocks.")


def build(side: int, channels: tuple[int, ...], layers: int, width: int = WIDTH) -> torch.nn.Module:
    """A U-Net with attention to the caption at all but the finest resolution, weights random."""
    attended = ["CrossAttnDownBlock2D"] * (len(channels) - 1)
    return UNet2DConditionModel(
        sample_size=side // PATCH,
        in_channels=3 * PATCH**2,
        out_channels=3 * PATCH**2,
        block_out_channels=channels,
        layers_per_block=layers,
        down_block_types=("DownBlock2D", *attended),
        up_block_types=(*[name.replace("Down", "Up") for name in attended], "UpBlock2D"),
        cross_attention_dim=width,
        # In this class the argument called head_dim is the number of heads.
        attention_head_dim=4,
        norm_num_groups=min(32, channels[0] // 2),
    )


def layers_of(unet: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Linear and convolution layers that adapters reach, with the shapes of their weights."""
    return {
        name: tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and name.startswith(ADAPTED)
    }


def matrices(weights: Weights, layers: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The weights of the adapted layers as `(out, in)` matrices; a kernel counts as inputs."""
    return {name: weights[f"{name}.weight"].flatten(1) for name in layers}


def drift(source: Weights, target: Weights) -> float:
    """`||W_t - W_s|| / ||W_s||` over all weights."""
    change = sum((target[k] - source[k]).double().square().sum() for k in source)
    size = sum(source[k].double().square().sum() for k in source)
    return math.sqrt(change / size)


def velocity(
    unet: torch.nn.Module, weights: Weights, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor
) -> torch.Tensor:
    """Predicted `noise - image` at `x = (1 - t) image + t noise`, in float32.

    Args:
        unet: the module whose structure is used.
        weights: all of its weights, of one dtype, which is the dtype of the computation.
        x: `(b, 3, side, side)`.
        t: `(b,)`, in [0, 1].
        text: `(b, tokens, width)`; zeros for no caption.
    """
    dtype = next(iter(weights.values())).dtype
    return through(partial(functional_call, unet, dict(weights)), x, t, text, dtype)


def through(
    call: Callable, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The velocity, by a U-Net that is called with a tuple of its arguments.

    What is linear in `x` is added to what the U-Net says (Karras et al., arXiv 2206.00364): it need
    not learn to hand through the noise.
    """
    patches = F.pixel_unshuffle(x.to(dtype), PATCH)
    out = F.pixel_shuffle(call((patches, 1000 * t, text.to(dtype))).sample, PATCH).float()
    best = (t - (1 - t) * VARIANCE) / ((1 - t) ** 2 * VARIANCE + t**2)
    return best[:, None, None, None] * x + out


def noised(image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The point of the straight path from an image to noise."""
    t = t[:, None, None, None]
    return (1 - t) * image + t * noise


class Packed:
    """All weights as one vector, so that casting, clipping and optimizing are a few kernels.

    Args:
        weights: whose names and shapes are kept.
    """

    def __init__(self, weights: Weights) -> None:
        # Views of a vector are aligned for tensor cores as long as what is before them is.
        names = sorted(weights, key=lambda name: weights[name].numel() % 64 != 0)
        self.shapes = {name: weights[name].shape for name in names}

    def pack(self, weights: Weights) -> torch.Tensor:
        """The vector of these weights, a copy in float32."""
        return torch.cat([weights[name].detach().flatten().float() for name in self.shapes])

    def unpack(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights in a vector, as views of it."""
        parts = vector.split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }


class Predictor:
    """The velocity for one batch size, replayed as a CUDA graph where there is a GPU.

    Weights are copied in, so that one graph serves every model and adapter.
    """

    def __init__(
        self, unet: torch.nn.Module, weights: Weights, batch: int, text_shape: tuple[int, ...]
    ) -> None:
        self.unet, self.batch = unet, batch
        self.weights = {k: v.detach().clone() for k, v in weights.items()}
        device = next(iter(weights.values())).device
        side = cast(UNet2DConditionModel, unet).config.sample_size * PATCH
        self.x = torch.zeros(batch, 3, side, side, device=device)
        self.t = torch.zeros(batch, device=device)
        self.text = torch.zeros(batch, *text_shape, device=device)
        self.graph = torch.cuda.CUDAGraph() if device.type == "cuda" else None
        if self.graph is not None:
            self._capture(self.graph)

    @torch.no_grad()
    def _capture(self, graph: torch.cuda.CUDAGraph) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._compute()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            self.out = self._compute()

    def _compute(self) -> torch.Tensor:
        return velocity(self.unet, self.weights, self.x, self.t, self.text)

    @torch.no_grad()
    def load(self, weights: Weights) -> None:
        """Use these weights from now on."""
        for name, value in self.weights.items():
            value.copy_(weights[name])

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """As `velocity`, for at most `batch` entries; the next call overwrites the result."""
        rows = len(x)
        self.x[:rows].copy_(x)
        self.t[:rows].copy_(t)
        self.text[:rows].copy_(text)
        if self.graph is None:
            return self._compute()[:rows]
        self.graph.replay()
        return self.out[:rows]


def denoising_loss(
    predict: Predictor, images: torch.Tensor, text: torch.Tensor, draws: int, seed: int
) -> float:
    """Mean squared error of the velocity, over evenly spaced times and noise fixed by the seed."""
    generator = torch.Generator(images.device).manual_seed(seed)
    times = (torch.arange(draws, device=images.device) + 0.5) / draws
    total = torch.zeros((), device=images.device, dtype=torch.float64)
    for time in times:
        noise = torch.randn(images.shape, device=images.device, generator=generator)
        for rows in torch.arange(len(images), device=images.device).split(predict.batch):
            image, t = images[rows], time.expand(len(rows))
            out = predict(noised(image, noise[rows], t), t, text[rows])
            total += (out - (noise[rows] - image)).double().square().mean() * len(rows)
    return (total / (draws * len(images))).item()


def sample(
    predict: Predictor, text: torch.Tensor, *, steps: int, guidance: float, seed: int
) -> torch.Tensor:
    """Pictures for captions, `(b, 3, side, side)` in [-1, 1]: Euler steps with guidance.

    The noise depends on the seed alone, so that methods are compared on the same draws.
    """
    side = predict.x.shape[-1]
    half = predict.batch // 2
    generator = torch.Generator(text.device).manual_seed(seed)
    noise = torch.randn(len(text), 3, side, side, device=text.device, generator=generator)
    pictures = []
    for x, caption in zip(noise.split(half), text.split(half), strict=True):
        both = torch.cat([caption, torch.zeros_like(caption)])
        for i in range(steps, 0, -1):
            t = torch.full((len(both),), i / steps, device=text.device)
            known, free = predict(torch.cat([x, x]), t, both).chunk(2)
            x = x - (free + guidance * (known - free)) / steps
        pictures.append(x)
    return torch.cat(pictures).clamp(-1, 1)
