# SPDX-License-Identifier: Apache-2.0
"""A Llama small enough to read: weights in a dictionary, a forward pass with a hook for adapters.

Static shapes and no module tree, so that a whole training step or decoding step fits in a CUDA
graph, and so that several adapters (seeds, learning rates) train side by side on one base. Names
are those of transformers; `tests/quality` holds the logits against its own implementation.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F

from lorax_transfer.checkpoints import open_checkpoint

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
FINAL_NORM = "model.norm.weight"
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int
    theta: float
    eps: float

    def module_names(self):
        """Every linear layer that an adapter sits on, in order."""
        return [
            f"model.layers.{i}.{part}"
            for i in range(self.layers)
            for part in (*(f"self_attn.{p}" for p in ATTENTION), *(f"mlp.{p}" for p in MLP))
        ]


def load_gguf(path):
    """Shape and float32 weights of a GGUF file of a Llama."""
    with open_checkpoint(path) as base:
        config = base.config()
        weights = {name: base.read(name).float() for name in base.names()}
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    shape = Shape(
        vocab=weights[EMBEDDING].shape[0],
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        ffn=config["intermediate_size"],
        head_dim=config.get("head_dim", hidden // heads),
        theta=config["rope_theta"],
        eps=1e-5,
    )
    return shape, weights


def random_model(shape, seed=0):
    """Random weights of a shape, for tests."""
    g = torch.Generator().manual_seed(seed)
    d, e = shape.hidden, shape.head_dim
    sizes = {
        "q_proj": (shape.heads * e, d),
        "k_proj": (shape.kv_heads * e, d),
        "v_proj": (shape.kv_heads * e, d),
        "o_proj": (d, shape.heads * e),
        "gate_proj": (shape.ffn, d),
        "up_proj": (shape.ffn, d),
        "down_proj": (d, shape.ffn),
    }
    weights = {EMBEDDING: torch.randn(shape.vocab, d, generator=g) * 0.3}
    for name in shape.module_names():
        m, n = sizes[name.rsplit(".", 1)[1]]
        weights[f"{name}.weight"] = torch.randn(m, n, generator=g) * n**-0.5
    for i in range(shape.layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{i}.{norm}.weight"] = torch.ones(d)
    weights[FINAL_NORM] = torch.ones(d)
    return weights


class Rotary:
    """Tables of the rotary embedding, and the rotation itself."""

    def __init__(self, shape, length, device, dtype):
        e = shape.head_dim
        inverse = shape.theta ** -(torch.arange(0, e, 2, device=device).float() / e)
        angles = torch.outer(torch.arange(length, device=device).float(), inverse)
        angles = torch.cat([angles, angles], 1)
        self.cos, self.sin = angles.cos().to(dtype), angles.sin().to(dtype)
        # Half a turn as a product with a signed permutation: one kernel instead of three.
        turn = torch.zeros(e, e, device=device, dtype=dtype)
        half = torch.arange(e // 2, device=device)
        turn[half + e // 2, half] = -1
        turn[half, half + e // 2] = 1
        self._turn = turn

    def __call__(self, x, cos, sin):
        """Rotate `x` `(..., heads, head_dim)`; the tables broadcast against it."""
        return torch.addcmul(x * cos, x @ self._turn, sin)


def base_linear(weights):
    """The linear hook without an adapter."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    return linear


def layer(shape, weights, i, x, linear, attend):
    """One block; `attend(i, q, k, v)` takes and returns `(batch, length, heads, head_dim)`."""
    name = f"model.layers.{i}"
    batch, length, d = x.shape
    h = F.rms_norm(x, (d,), weights[f"{name}.input_layernorm.weight"], shape.eps)
    q, k, v = (
        linear(f"{name}.self_attn.{part}", h).view(batch, length, -1, shape.head_dim)
        for part in ATTENTION[:3]
    )
    mixed = attend(i, q, k, v).reshape(batch, length, -1)
    x = x + linear(f"{name}.self_attn.o_proj", mixed)
    h = F.rms_norm(x, (d,), weights[f"{name}.post_attention_layernorm.weight"], shape.eps)
    gate, up = linear(f"{name}.mlp.gate_proj", h), linear(f"{name}.mlp.up_proj", h)
    return x + linear(f"{name}.mlp.down_proj", F.silu(gate) * up)


def causal(shape, rotary, length, keep=None):
    """Causal attention over whole rows, padded on the right; keys and values go to `keep`."""
    cos, sin = rotary.cos[:length, None], rotary.sin[:length, None]
    times = shape.heads // shape.kv_heads

    def attend(i, q, k, v):
        q, k = rotary(q, cos, sin), rotary(k, cos, sin)
        if keep is not None:
            keep(i, k, v)
        k, v = (
            t[:, :, :, None].expand(-1, -1, -1, times, -1).reshape(q.shape).transpose(1, 2)
            for t in (k, v)
        )
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True)
        return out.transpose(1, 2)

    return attend


class _Lookup(torch.autograd.Function):
    """Rows of the embedding; the gradient is summed in float32 and without a host sync."""

    @staticmethod
    def forward(ctx, table, ids):
        ctx.save_for_backward(ids)
        ctx.shape = table.shape
        return table.index_select(0, ids)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        total = torch.zeros(ctx.shape, dtype=torch.float32, device=grad.device)
        return total.index_add_(0, ids, grad.float()).to(grad.dtype), None


def hidden_states(shape, weights, ids, linear, attend, watch=None):
    """Final hidden states `(batch, length, hidden)` of token ids `(batch, length)`."""
    x = _Lookup.apply(weights[EMBEDDING], ids.reshape(-1)).view(*ids.shape, -1)
    for i in range(shape.layers):
        x = layer(shape, weights, i, x, linear, attend)
        if watch is not None:
            watch(i, x)
    return F.rms_norm(x, (shape.hidden,), weights[FINAL_NORM], shape.eps)


def head(weights):
    """The output matrix: the embedding's own where they are tied."""
    return weights.get(HEAD, weights[EMBEDDING])


def captured(run, device):
    """`run` as one graph on a GPU, after a warm-up; elsewhere itself.

    A graph goes by addresses: `run` must hold what it reads and changes, and is held with it.
    """
    if device.type != "cuda":
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return partial(_replay, graph, run)


def _replay(graph, run):
    graph.replay()


def drift(source, target, names):
    """Mean relative change of the weights of `names`."""
    changes = [
        (target[f"{n}.weight"] - source[f"{n}.weight"]).norm() / source[f"{n}.weight"].norm()
        for n in names
    ]
    return torch.stack(changes).mean().item()


def shallower(shape, layers):
    """The shape with fewer layers."""
    return replace(shape, layers=layers)
