# SPDX-License-Identifier: Apache-2.0
"""Maps between two models of different width or depth, and an adapter carried through them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

import lorax_kernels as lk

from ._depth import Stack, find_stack, match_layers, split
from ._weights import read_matrix, transposed_modules
from .adapters import Adapter
from .checkpoints import Checkpoint
from .errors import MatchError
from .matching import EMBEDDINGS
from .plan import LayerPlan, Plan
from .report import AlignmentFacts
from .settings import Settings

# Mean cosine of two models' embeddings, token by token, above which they share their coordinates:
# unrelated models score 0.0, MiniLM-L6 and gte-small, of one ancestor, 0.75.
_RELATED = 0.3
# Share by which two vocabularies may differ in size: padding, and tokens that were added.
_VOCABULARY = 0.02

# Last names of modules that write to the residual stream; the others read it.
_WRITERS = ("down_proj", "o_proj", "out_proj", "c_proj", "fc2", "w2", "wo", "dense_4h_to_h")
_BERT_WRITER, _BERT_READER = "output.dense", "intermediate.dense"
# Modules around one inner space: those that read the stream into it, and those that write from it.
_SPACES = (
    (("gate_proj", "up_proj"), ("down_proj",)),
    (("w1", "w3"), ("w2",)),
    (("fc1",), ("fc2",)),
    (("v_proj",), ("o_proj",)),
)
# Norms in front of modules, with the first name that a checkpoint has.
_NORMS = {
    "self_attn.q_proj": ("input_layernorm",),
    "self_attn.k_proj": ("input_layernorm",),
    "self_attn.v_proj": ("input_layernorm",),
    "mlp.gate_proj": ("pre_feedforward_layernorm", "post_attention_layernorm"),
    "mlp.up_proj": ("pre_feedforward_layernorm", "post_attention_layernorm"),
}

Factors = tuple[torch.Tensor, torch.Tensor]
_Named = tuple[Checkpoint, str]


@dataclass(frozen=True)
class Alignment:
    """How the modules of an adapter correspond to those of another model.

    Attributes:
        source: the source's layers.
        target: the target's.
        stream: map of the residual stream `(d_t, d_s)`; None for the identity.
        modules: the target's module for each of the adapter's that has one.
        unmatched: the others, with the reason.
        facts: of the alignment, for the report.
    """

    source: Stack
    target: Stack
    stream: torch.Tensor | None
    modules: dict[str, str]
    unmatched: dict[str, str]
    facts: AlignmentFacts


def find_alignment(
    adapter: Adapter,
    source: Checkpoint,
    target: Checkpoint,
    settings: Settings,
    device: torch.device,
) -> Alignment:
    """Find the maps between two models from their weights.

    Args:
        adapter: what is to be moved.
        source: the base model that it was trained on.
        target: the base model that it is moved to.
        settings: the options.
        device: where to compute.

    Returns:
        The alignment.

    Raises:
        MatchError: the models cannot be compared.
    """
    modules = [module for module in adapter.layers if settings.excludes(module) is None]
    if any(adapter.layers[module].is_conv for module in modules):
        raise MatchError(
            "method aligned is for linear layers, but the adapter updates convolutions; use "
            "--method copy, or --exclude them."
        )
    in_source, in_target = (
        find_stack(modules, checkpoint, role)
        for checkpoint, role in ((source, "source"), (target, "target"))
    )
    stream = _stream(source, target, device)
    tensors = {module: in_source.tensor(module) for module in modules}
    turned = transposed_modules(adapter, source, tensors)
    by_kind = {place[2]: turned[x] for x in modules if (place := split(x)) is not None}
    writers = {suffix: is_writer(suffix) for suffix in in_source.tensors[0]}
    matched, likeness = match_layers(in_source, in_target, stream, writers, by_kind, device)
    to_layer = {i: j for j, i in enumerate(matched) if i is not None}
    paired, unmatched = {}, {}
    for module in modules:
        place = split(module)
        if place is None:
            paired[module] = module
        elif place[1] in to_layer:
            paired[module] = f"{place[0]}.{to_layer[place[1]]}.{place[2]}"
        else:
            unmatched[module] = "no layer of the target stands for this one"
    scores = [score for i, score in zip(matched, likeness, strict=True) if i is not None]
    facts = AlignmentFacts(
        stream="identity" if stream is None else "procrustes",
        source_layers=len(in_source.tensors),
        target_layers=len(in_target.tensors),
        paired=len(scores),
        likeness=sum(scores) / len(scores) if scores else 0.0,
    )
    return Alignment(in_source, in_target, stream, paired, unmatched, facts)


def is_writer(module: str) -> bool:
    """Whether a module writes to the residual stream, by its name."""
    if module.endswith(_BERT_WRITER) and not module.endswith(_BERT_READER):
        return True
    return module.rpartition(".")[2] in _WRITERS


def _stream(source: Checkpoint, target: Checkpoint, device: torch.device) -> torch.Tensor | None:
    names = [_embedding(source, "source"), _embedding(target, "target")]
    rows = [source.shape(names[0])[0], target.shape(names[1])[0]]
    if min(rows) < (1 - _VOCABULARY) * max(rows):
        raise MatchError(
            f"the vocabularies have {rows[0]} and {rows[1]} tokens, expected models that share a "
            "tokenizer; without common tokens nothing tells how their residual streams correspond."
        )
    E_s = source.read(names[0])[: min(rows)].to(device)
    E_t = target.read(names[1])[: min(rows)].to(device)
    if E_s.shape == E_t.shape:
        cosine = torch.nn.functional.cosine_similarity(E_s.float(), E_t.float(), dim=1)
        if float(cosine.mean()) > _RELATED:
            return None
    return lk.procrustes(E_s, E_t)


def _embedding(checkpoint: Checkpoint, role: str) -> str:
    found = [name for name in checkpoint.names() if name.endswith(EMBEDDINGS)]
    found = [x for x in found if "position" not in x and "token_type" not in x]
    if len(found) != 1:
        raise MatchError(
            f"the {role} {checkpoint.location} has {len(found)} token embeddings, expected one "
            f"named like {EMBEDDINGS[0]}; method aligned compares the models through it."
        )
    return found[0]


def carry(
    alignment: Alignment, adapter: Adapter, plan: Plan, device: torch.device
) -> Iterator[tuple[str, Factors]]:
    """Carry every planned update through the alignment, a layer of the models at a time.

    Args:
        alignment: of the two models.
        adapter: what is moved.
        plan: made with the alignment.
        device: where to compute.

    Yields:
        A module of the adapter, and its factors for the target, in float32 on the CPU.
    """
    inner: dict[tuple[str, ...], torch.Tensor] = {}
    for planned in sorted(plan.layers, key=lambda x: (split(x.module) or ("", -1, ""))[1]):
        layer = adapter.layers[planned.module]
        B, A = (x.to(device, torch.float32) for x in (layer.matrix_B, layer.matrix_A))
        source = alignment.source.checkpoint, planned.source_tensor
        target = alignment.target.checkpoint, planned.target_tensor
        W_s, W_t = (
            read_matrix(*named, planned.is_transposed, device).float() for named in (source, target)
        )
        if alignment.stream is None and not planned.is_reshaped:
            moved = lk.align_lora(B, A, size=_size(W_s, W_t))
        else:
            moved = _through_maps(alignment, planned, (B, A), (W_s, W_t), inner)
        yield planned.module, (moved[0].cpu(), moved[1].cpu())


def _through_maps(
    alignment: Alignment,
    planned: LayerPlan,
    factors: Factors,
    weights: Factors,
    inner: dict[tuple[str, ...], torch.Tensor],
) -> Factors:
    W_s, W_t = weights
    device = W_s.device
    writes = is_writer(planned.module)
    side = 0 if writes else 1
    stream = alignment.stream
    stream = torch.eye(W_s.shape[side]) if stream is None else stream
    stream = stream.to(device)
    if (W_t.shape[side], W_s.shape[side]) != tuple(stream.shape):
        raise MatchError(
            f"{planned.module} is {tuple(W_s.shape)} and {tuple(W_t.shape)}, expected its "
            f"{'outputs' if writes else 'inputs'} to be residual streams of {stream.shape[1]} and "
            f"{stream.shape[0]}; leave it out with --exclude."
        )
    if planned.is_table:
        if len(W_s) != len(W_t):
            raise MatchError(
                f"{planned.module} has {len(W_s)} outputs in the source and {len(W_t)} in the "
                "target, expected one vocabulary; leave it out with --exclude."
            )
        return lk.align_lora(*factors, None, stream, size=_size(W_s, W_t))
    gains = None if writes else _gains(alignment, planned, device)
    if gains is not None:
        W_s, W_t = W_s * gains[0], W_t * gains[1]
    key = _space(alignment, planned)
    if key not in inner:
        # Layers come in order, so that an earlier one's maps are not needed again.
        inner.clear()
        inner[key] = _inner_map(alignment, planned, key, stream)
    maps = (stream, inner[key]) if writes else (inner[key], stream)
    return lk.align_lora(*factors, *maps, gains=gains, size=_size(W_s, W_t))


def _size(W_s: torch.Tensor, W_t: torch.Tensor) -> float:
    norm = float(torch.linalg.vector_norm(W_s, dtype=torch.float64))
    return float(torch.linalg.vector_norm(W_t, dtype=torch.float64)) / norm if norm else 1.0


def _space(alignment: Alignment, planned: LayerPlan) -> tuple[str, ...]:
    """The source's weights around the inner space of a module, itself included."""
    leaf = planned.module.rpartition(".")[2]
    for reads, writes in _SPACES:
        if leaf in (*reads, *writes):
            names = [planned.source_tensor.replace(leaf, x) for x in (*reads, *writes)]
            twins = [planned.target_tensor.replace(leaf, x) for x in (*reads, *writes)]
            if _share_a_space(alignment.source.checkpoint, names) and _share_a_space(
                alignment.target.checkpoint, twins
            ):
                return tuple(names)
    return (planned.source_tensor,)


def _share_a_space(checkpoint: Checkpoint, names: list[str]) -> bool:
    """Grouped queries write from more heads than values have; such spaces are kept apart."""
    if not set(checkpoint.names()).issuperset(names):
        return False
    sides = {
        checkpoint.shape(name)[1 if is_writer(name.removesuffix(".weight")) else 0]
        for name in names
    }
    return len(sides) == 1


def _inner_map(
    alignment: Alignment, planned: LayerPlan, names: tuple[str, ...], stream: torch.Tensor
) -> torch.Tensor:
    source, target = alignment.source.checkpoint, alignment.target.checkpoint
    leaf = planned.module.rpartition(".")[2]
    reads, writes = [], []
    for name in names:
        own = name.removesuffix(".weight").rpartition(".")[2]
        module = planned.module.removesuffix(leaf) + own if len(names) > 1 else planned.module
        twin = planned.target_tensor.replace(leaf, own) if len(names) > 1 else planned.target_tensor
        W_s, W_t = (
            read_matrix(checkpoint, x, planned.is_transposed, stream.device).float()
            for checkpoint, x in ((source, name), (target, twin))
        )
        if is_writer(module):
            writes.append((W_s, W_t))
            continue
        gains = _gains(alignment, planned, stream.device, module)
        reads.append((W_s, W_t) if gains is None else (W_s * gains[0], W_t * gains[1]))
    return lk.inner_map(stream, reads, writes)


def _gains(
    alignment: Alignment, planned: LayerPlan, device: torch.device, module: str | None = None
) -> Factors | None:
    """Weights of the norms in front of a module, where both models have one by a known name."""
    leaf = planned.module.rpartition(".")[2]
    own = (module or planned.module).rpartition(".")[2]
    found = []
    for stack, tensor in (
        (alignment.source, planned.source_tensor),
        (alignment.target, planned.target_tensor),
    ):
        name = tensor.removesuffix(".weight").removesuffix(leaf) + own
        suffix = next((suffix for suffix in _NORMS if name.endswith(suffix)), None)
        if suffix is None:
            return None
        names = set(stack.checkpoint.names())
        norms = [f"{name.removesuffix(suffix)}{norm}.weight" for norm in _NORMS[suffix]]
        norm = next((x for x in norms if x in names), None)
        if norm is None:
            return None
        gain = stack.checkpoint.read(norm).to(device, torch.float32)
        # Gemma stores how far its gains are from one.
        is_shifted = str(stack.checkpoint.config().get("model_type", "")).startswith("gemma")
        found.append(gain + 1 if is_shifted else gain)
    return found[0], found[1]
