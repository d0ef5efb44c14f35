# SPDX-License-Identifier: Apache-2.0
"""What a GGUF conversion does to a Hugging Face model, by architecture, and how to undo it.

llama.cpp's converter renames every tensor, interleaves the rows of q and k for models whose rope
it runs on neighbouring pairs, adds 1 to norm weights that the model applies as (1 + w), and
transposes GPT-2's Conv1D weights. Its name tables map many Hugging Face names onto one GGUF name,
so the way back needs a choice per architecture: that is the table below.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_TIED = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_GLOBAL = _TIED | {"output": "lm_head"}
_ATTENTION = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_UP_DOWN = {"ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_MLP = _UP_DOWN | {"ffn_gate": "mlp.gate_proj"}
# The experts are stacked in GGUF, so only the router has a name of its own to go back to.
_ROUTER = {"ffn_gate_inp": "mlp.gate"}
_NORMS_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


@dataclass(frozen=True)
class Rules:
    """How one architecture was converted.

    Attributes:
        model_type: Hugging Face's name of the architecture.
        block: GGUF name within a block -> Hugging Face name within a layer.
        top: GGUF name outside the blocks -> Hugging Face name.
        layers: Hugging Face's prefix of the layers.
        permuted: GGUF names within a block whose rows are interleaved per head.
        shifted_norms: norm weights are stored with 1 added.
        transposed: GGUF names within a block whose weight is stored transposed.
    """

    model_type: str
    block: Mapping[str, str]
    top: Mapping[str, str]
    layers: str = "model.layers"
    permuted: frozenset[str] = frozenset()
    shifted_norms: bool = False
    transposed: frozenset[str] = frozenset()


_ROPE_PAIRS = frozenset({"attn_q", "attn_k"})
_LLAMA = _ATTENTION | _MLP

ARCHITECTURES = {
    # Mistral and Mixtral are converted as "llama" too.
    "llama": Rules("llama", _LLAMA, _GLOBAL, permuted=_ROPE_PAIRS),
    "mistral3": Rules("ministral3", _LLAMA, _GLOBAL, permuted=_ROPE_PAIRS),
    "smollm3": Rules("smollm3", _LLAMA, _GLOBAL, permuted=_ROPE_PAIRS),
    "granite": Rules("granite", _LLAMA, _GLOBAL, permuted=_ROPE_PAIRS),
    "qwen2": Rules("qwen2", _LLAMA, _GLOBAL),
    "qwen2moe": Rules("qwen2_moe", _ATTENTION | _ROUTER, _GLOBAL),
    "qwen3": Rules("qwen3", _LLAMA | _HEAD_NORMS, _GLOBAL),
    "qwen3moe": Rules("qwen3_moe", _ATTENTION | _HEAD_NORMS | _ROUTER, _GLOBAL),
    "gemma": Rules("gemma", _LLAMA, _TIED, shifted_norms=True),
    "gemma2": Rules("gemma2", _LLAMA | _NORMS_AROUND, _TIED, shifted_norms=True),
    "gemma3": Rules(
        "gemma3_text", _LLAMA | _HEAD_NORMS | _NORMS_AROUND, _GLOBAL, shifted_norms=True
    ),
    "olmo2": Rules(
        "olmo2",
        {
            name: hf
            for name, hf in (_LLAMA | _HEAD_NORMS | _NORMS_AROUND).items()
            if name not in ("attn_norm", "ffn_norm")
        },
        _GLOBAL,
    ),
    "phi3": Rules(
        "phi3",
        _ATTENTION
        | {
            "attn_qkv": "self_attn.qkv_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _GLOBAL,
    ),
    "starcoder2": Rules(
        "starcoder2", _ATTENTION | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, _GLOBAL
    ),
    "stablelm": Rules("stablelm", _LLAMA, _GLOBAL),
    "nemotron": Rules("nemotron", _ATTENTION | _UP_DOWN, _GLOBAL, shifted_norms=True),
    "gpt2": Rules(
        "gpt2",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        layers="transformer.h",
        transposed=frozenset({"attn_qkv", "attn_output", "ffn_up", "ffn_down"}),
    ),
    "bert": Rules(
        "bert",
        {
            "attn_q": "attention.self.query",
            "attn_k": "attention.self.key",
            "attn_v": "attention.self.value",
            "attn_output": "attention.output.dense",
            "attn_output_norm": "attention.output.LayerNorm",
            "ffn_up": "intermediate.dense",
            "ffn_down": "output.dense",
            "layer_output_norm": "output.LayerNorm",
        },
        {
            "token_embd": "embeddings.word_embeddings",
            "position_embd": "embeddings.position_embeddings",
            "token_types": "embeddings.token_type_embeddings",
            "token_embd_norm": "embeddings.LayerNorm",
        },
        layers="encoder.layer",
    ),
}

_BLOCK_NAME = re.compile(r"blk\.(\d+)\.([a-z0-9_]+)\.(weight|bias)")
_TOP_NAME = re.compile(r"([a-z0-9_]+)\.(weight|bias)")


@dataclass(frozen=True)
class Tensor:
    """What a GGUF name stands for.

    Attributes:
        name: the Hugging Face name, or the GGUF name where there is no counterpart (fused experts,
            rope factors).
        block: the layer's number; None outside the layers.
        permuted: the GGUF role ("attn_q" or "attn_k") if its rows are interleaved, else None.
        shift: what to add to the stored values.
        is_transposed: the stored matrix is the transpose of Hugging Face's.
    """

    name: str
    block: int | None = None
    permuted: str | None = None
    shift: float = 0.0
    is_transposed: bool = False


def translate(rules: Rules, gguf_name: str) -> Tensor:
    """Finds the Hugging Face name of a GGUF tensor and what has to be undone to its values.

    Args:
        rules: the architecture, a value of `ARCHITECTURES`.
        gguf_name: such as "blk.0.attn_q.weight".

    Returns:
        The translation; the GGUF name itself where Hugging Face has no such tensor.

    Example:
        >>> translate(ARCHITECTURES["llama"], "blk.3.attn_k.weight").name
        'model.layers.3.self_attn.k_proj.weight'
    """
    if match := _BLOCK_NAME.fullmatch(gguf_name):
        block, role, kind = match.groups()
        if role in rules.block:
            return Tensor(
                f"{rules.layers}.{block}.{rules.block[role]}.{kind}",
                int(block),
                role if role in rules.permuted else None,
                _shift(rules, role, kind),
                kind == "weight" and role in rules.transposed,
            )
    elif (match := _TOP_NAME.fullmatch(gguf_name)) and match[1] in rules.top:
        role, kind = match.groups()
        return Tensor(f"{rules.top[role]}.{kind}", shift=_shift(rules, role, kind))
    return Tensor(gguf_name)


def _shift(rules: Rules, role: str, kind: str) -> float:
    is_norm_weight = role.endswith("norm") and kind == "weight"
    return -1.0 if rules.shifted_norms and is_norm_weight else 0.0
