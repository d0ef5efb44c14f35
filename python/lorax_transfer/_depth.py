# SPDX-License-Identifier: Apache-2.0
"""Which layer of the target stands for which layer of the source, told from their weights."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

import lorax_kernels as lk

from ._weights import read_matrix
from .checkpoints import Checkpoint
from .errors import MatchError
from .matching import match

_INDEX = re.compile(r"(.+?)\.(\d+)\.(.+)")

# Weights are compared through random projections of their sides to as many dimensions: the error of
# a cosine is 1/64.
_SKETCH = 64
# Modules of each layer that are compared, the smallest ones.
_COMPARED = 3


@dataclass(frozen=True)
class Stack:
    """The repeated layers of one model, under the names that the adapter's modules have.

    Attributes:
        checkpoint: where they are.
        rule: how modules were found, in words.
        prefix: path of the layers, `model.layers` for instance.
        tensors: for each layer, its weights by the rest of their module's path.
        others: weights of modules outside of the layers.
    """

    checkpoint: Checkpoint
    rule: str
    prefix: str
    tensors: list[dict[str, str]]
    others: dict[str, str]

    def tensor(self, module: str) -> str:
        """The weight of a module."""
        place = split(module)
        return self.others[module] if place is None else self.tensors[place[1]][place[2]]


def split(module: str) -> tuple[str, int, str] | None:
    """Path of the layers, index of one, and what follows; None outside of the layers."""
    found = _INDEX.fullmatch(module)
    return None if found is None else (found[1], int(found[2]), found[3])


def find_stack(modules: Sequence[str], checkpoint: Checkpoint, role: str) -> Stack:
    """Find the layers of a model that hold modules like an adapter's.

    Args:
        modules: module paths of the adapter.
        checkpoint: where to look.
        role: "source" or "target", for messages.

    Returns:
        All layers of the model, whether the adapter updates them or not.

    Raises:
        MatchError: there are none, or they belong to several stacks.
    """
    places = [place for place in map(split, modules) if place is not None]
    prefixes = sorted({prefix for prefix, _, _ in places})
    if len(prefixes) != 1:
        raise MatchError(
            f"method aligned needs modules in one stack of layers, the adapter's are in "
            f"{', '.join(prefixes) or 'none'}; use --include for one of them."
        )
    prefix = prefixes[0]
    suffixes = list(dict.fromkeys(suffix for _, _, suffix in places))
    others = [module for module in modules if split(module) is None]
    firsts = {f"{prefix}.0.{suffix}": suffix for suffix in suffixes}
    found = match([*firsts, *others], checkpoint, role)
    names, leaf = set(checkpoint.names()), prefix.rpartition(".")[2]
    tensors: list[dict[str, str]] = []
    while True:
        layer = {
            suffix: found.tensors[module].replace(f"{leaf}.0.", f"{leaf}.{len(tensors)}.")
            for module, suffix in firsts.items()
        }
        if not names.issuperset(layer.values()):
            break
        tensors.append(layer)
    return Stack(checkpoint, found.rule, prefix, tensors, {x: found.tensors[x] for x in others})


def match_layers(
    source: Stack,
    target: Stack,
    stream: torch.Tensor | None,
    writers: Mapping[str, bool],
    is_transposed: Mapping[str, bool],
    device: torch.device,
) -> tuple[list[int | None], list[float]]:
    """The source's layer for each of the target's.

    Relatives that share their coordinates are compared weight by weight; others by how their
    weights meet the residual stream, `W^T W` or `W W^T`, which no choice of inner coordinates
    changes. What all layers of a model have in common is taken away first.

    Args:
        source: the source's layers.
        target: the target's.
        stream: map of the residual stream `(d_t, d_s)`; None for the identity.
        writers: whether each kind of module writes the stream (rather than reads it).
        is_transposed: whether each kind is stored `(in, out)`.
        device: where to compute.

    Returns:
        An index, or None, for each layer of the target, and the likeness of each pair.
    """
    sizes = {s: target.checkpoint.shape(name) for s, name in target.tensors[0].items()}
    chosen = sorted(sizes, key=lambda suffix: sizes[suffix][0] * sizes[suffix][1])[:_COMPARED]
    total = torch.zeros(len(target.tensors), len(source.tensors), dtype=torch.float64)
    for suffix in chosen:
        turned = is_transposed[suffix]
        is_same = stream is None and all(
            source.checkpoint.shape(source.tensors[0][suffix]) == shape for shape in [sizes[suffix]]
        )
        sketches = []
        for stack, mapped in ((source, stream), (target, None)):
            weights = (
                read_matrix(stack.checkpoint, layer[suffix], turned, device)
                for layer in stack.tensors
            )
            if is_same:
                found = _sketches(weights)
            else:
                found = _stream_sketches(weights, mapped, writers[suffix])
                found = found - found.mean(0)
            sketches.append(torch.nn.functional.normalize(found, dim=1))
        total += sketches[1] @ sketches[0].mT
    likeness = (total / len(chosen)).tolist()
    matched = lk.match_depth(likeness)
    pairs = [0.0 if i is None else likeness[j][i] for j, i in enumerate(matched)]
    return matched, pairs


def _random(rows: int, seed: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, _SKETCH, generator=generator).to(device)


def _sketches(weights: Iterator[torch.Tensor]) -> torch.Tensor:
    """`G^T W H` of each, in a row: inner products are those of the weights, about."""
    rows = []
    for W in weights:
        left, right = _random(W.shape[0], 1, W.device), _random(W.shape[1], 2, W.device)
        rows.append((left.mT @ W.float() @ right).flatten().double().cpu())
    return torch.stack(rows)


def _stream_sketches(
    weights: Iterator[torch.Tensor], stream: torch.Tensor | None, is_writer: bool
) -> torch.Tensor:
    """`G^T Z Z^T H` of each, in a row, with `Z` the weight's side in the target's stream."""
    rows = []
    for W in weights:
        Z = W.float() if is_writer else W.float().mT
        Z = Z if stream is None else stream.to(W.device) @ Z
        left, right = _random(len(Z), 1, W.device), _random(len(Z), 2, W.device)
        rows.append(((left.mT @ Z) @ (Z.mT @ right)).flatten().double().cpu())
    return torch.stack(rows)
