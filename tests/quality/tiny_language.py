# SPDX-License-Identifier: Apache-2.0
"""A language model of a few thousand numbers, and adapters of it."""

import numpy as np
import torch

import lorax_kernels as lk
from benchmarks.quality import lm_adapters, lm_model, lm_train

SHAPE = lm_model.Shape(
    vocab=61, hidden=48, layers=3, heads=6, kv_heads=2, ffn=80, head_dim=8, theta=1e4, eps=1e-5
)
NAMES = SHAPE.module_names()


def logits(shape, weights, ids):
    rotary = lm_model.Rotary(shape, ids.shape[1], ids.device, torch.float32)
    attend = lm_model.causal(shape, rotary, ids.shape[1])
    states = lm_model.hidden_states(shape, weights, ids, lm_model.base_linear(weights), attend)
    return states @ lm_model.head(weights).T


def ids(rows=4, length=12):
    return torch.from_numpy(np.random.default_rng(1).integers(3, SHAPE.vocab, (rows, length)))


def make(form, weights):
    if form == "lora":
        return lm_adapters.Lora({n: tuple(weights[f"{n}.weight"].shape) for n in NAMES}, 4)
    core, power = form
    bases = {n: lk.truncated_svd(weights[f"{n}.weight"], 8) for n in NAMES}
    made = lm_adapters.LoraX(bases, core, sigma_power=power, band=2 if core == "banded" else 0)
    return made.prepare(torch.device("cpu"), torch.float32)


def train(weights, form, examples, seeds, rates, steps=12):
    return lm_train.train_adapters(
        SHAPE, weights, form, examples, length=12, seeds=seeds, rates=rates, steps=steps, batch=8
    )
