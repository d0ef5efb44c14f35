# SPDX-License-Identifier: Apache-2.0
"""Adapters between models of another depth or width, along the maps of `lk.alignment`."""

from dataclasses import dataclass, field

import torch

import lorax_kernels as lk

from .lm_model import ATTENTION, EMBEDDING, MLP

# The smallest modules of a layer tell which layer it is.
_COMPARED = ("self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj")
_WRITERS = ("o_proj", "down_proj")


@dataclass(frozen=True)
class Maps:
    """How a target corresponds to a source.

    Attributes:
        layers: for each target layer the source's, or None.
        likeness: mean of the pairs.
        stream: `(d_t, d_s)`, or None for the identity.
        inner: target module -> map of its other side; empty for the identity.
    """

    layers: list
    likeness: float
    stream: torch.Tensor | None = None
    inner: dict = field(default_factory=dict)

    def reversed(self, count):
        """The maps of the way back; `count` layers in the source."""
        layers = [None] * count
        for j, i in enumerate(self.layers):
            if i is not None:
                layers[i] = j
        inner = {}
        for name, there in self.inner.items():
            j, part = _split(name)
            inner[f"model.layers.{self.layers[j]}.{part}"] = there.mT
        stream = None if self.stream is None else self.stream.mT
        return Maps(layers, self.likeness, stream, inner)


def _split(name):
    _, _, index, part = name.split(".", 3)
    return int(index), part


def _gain(model, name):
    """Weight of the norm in front of a module that reads the stream."""
    i, part = _split(name)
    norm = "input_layernorm" if part.startswith("self_attn") else "post_attention_layernorm"
    return model.weights[f"model.layers.{i}.{norm}.weight"]


def find_maps(source, target):
    """Compare two models; of one width they are taken to share the coordinates of the stream."""
    stream = None
    if source.shape.hidden != target.shape.hidden:
        stream = lk.procrustes(source.weights[EMBEDDING], target.weights[EMBEDDING])
    like = torch.zeros(target.shape.layers, source.shape.layers, dtype=torch.float64)
    for part in _COMPARED:
        rows = []
        for model, mapped in ((target, None), (source, stream)):
            found = []
            for i in range(model.shape.layers):
                W = model.matrix(f"model.layers.{i}.{part}")
                if stream is not None:
                    Z = W.mT if mapped is None else mapped @ W.mT
                    W = Z @ Z.mT
                found.append(W.flatten())
            found = torch.stack(found)
            # What all layers have in common says nothing, where only squares are compared.
            found = found if stream is None else found - found.mean(0)
            rows.append(torch.nn.functional.normalize(found, dim=1))
        like += (rows[0] @ rows[1].mT).double().cpu()
    like = (like / len(_COMPARED)).tolist()
    layers = lk.match_depth(like)
    pairs = [like[j][i] for j, i in enumerate(layers) if i is not None]
    likeness = sum(pairs) / len(pairs) if pairs else 0.0
    inner = {} if stream is None else _inner_maps(source, target, stream, layers)
    return Maps(layers, likeness, stream, inner)


def _inner_maps(source, target, stream, layers):
    inner = {}
    for j, i in enumerate(layers):
        if i is None:
            continue

        def pair(part, i=i, j=j):
            names = f"model.layers.{i}.{part}", f"model.layers.{j}.{part}"
            W_s, W_t = source.matrix(names[0]), target.matrix(names[1])
            if part.rpartition(".")[2] in _WRITERS:
                return W_s, W_t
            return W_s * _gain(source, names[0]), W_t * _gain(target, names[1])

        for part in ATTENTION:
            name = f"self_attn.{part}"
            side = {"writes" if part in _WRITERS else "reads": [pair(name)]}
            inner[f"model.layers.{j}.{name}"] = lk.inner_map(stream, **side)
        reads = [pair(f"mlp.{part}") for part in MLP[:2]]
        units = lk.inner_map(stream, reads, [pair(f"mlp.{MLP[2]}")])
        inner |= {f"model.layers.{j}.mlp.{part}": units for part in MLP}
    return inner


def aligned(pair, adapter, *, maps, sized=True):
    """Every update through the maps; `sized` keeps it as large beside its weight as it was."""
    out = {}
    for name in pair.target.shape.module_names():
        j, part = _split(name)
        i = maps.layers[j]
        if i is None:
            continue
        old = f"model.layers.{i}.{part}"
        W_s, W_t = pair.source.matrix(old), pair.target.matrix(name)
        options = {}
        if maps.stream is not None and part.rpartition(".")[2] in _WRITERS:
            options = {"output_map": maps.stream, "input_map": maps.inner[name]}
        elif maps.stream is not None:
            gains = _gain(pair.source, old), _gain(pair.target, name)
            W_s, W_t = W_s * gains[0], W_t * gains[1]
            options = {"output_map": maps.inner[name], "input_map": maps.stream, "gains": gains}
        if sized:
            options["size"] = float(W_t.norm() / W_s.norm())
        out[name] = lk.align_lora(*adapter.factors[old], **options)
    return out


def by_index(pair, adapter):
    """Layer for layer from the bottom: a control."""
    del pair
    return dict(adapter.factors)


def by_share(pair, adapter):
    """Layers at the same share of the depth, without looking at a weight: a control."""
    out = {}
    count, old = pair.target.shape.layers, pair.source.shape.layers
    for name in pair.target.shape.module_names():
        j, part = _split(name)
        i = round(j * (old - 1) / max(1, count - 1))
        out[name] = adapter.factors[f"model.layers.{i}.{part}"]
    return out
