# SPDX-License-Identifier: Apache-2.0
"""PEFT's PiSSA initialisation: many layers in one truncated SVD.

PEFT initialises layer by layer while it builds the model. Inside `inject_adapter` the layers are
collected instead, and decomposed in batches of equal shapes when all of them are there. The random
numbers that factors are born with and that nobody sees are not drawn, and factors are allocated
where they will stay: with the SVDs out of the way, building the modules is most of the time.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..svd import truncated_svd
from ..svd_types import SVD
from ._switch import Options

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Who asks for "pissa_niter_N" asks for less than exact, and gets it to this many times the
# tolerance. Sixteen iterations leave errors of 0.15 to 0.4 on trained weights.
_FAST = 10


@dataclass
class _Queue:
    """Layers that wait for their initialisation, and the weights that they will change."""

    options: Options
    entries: list[tuple[Any, str, float]] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)

    def add(self, layer: Any, adapter: str, tol: float) -> None:
        """Queue a layer; one whose weight is queued already has to see it changed first."""
        weight = layer.get_base_layer().weight
        address = weight.data_ptr()
        if address in self.weights:
            self.flush()
        self.entries.append((layer, adapter, tol))
        self.weights.add(address)
        # Where PEFT moves them next and in the dtype that it gives them: empty, they cost nothing.
        _allocate(layer, adapter, weight.dtype)

    def is_last(self, layer: Any, adapter: str) -> bool:
        """Whether this layer was queued just now, with nothing in the adapter but its factors."""
        return (
            bool(self.entries)
            and self.entries[-1][0] is layer
            and self.entries[-1][1] == adapter
            and type(layer.get_base_layer()) is torch.nn.Linear
            and layer.lora_B[adapter].bias is None
        )

    @torch.no_grad()
    def flush(self) -> None:
        """Initialise what waits."""
        entries, self.entries = self.entries, []
        self.weights.clear()
        groups: dict[tuple[int, float], list[tuple[Any, str]]] = {}
        for layer, adapter, tol in entries:
            groups.setdefault((layer.r[adapter], tol), []).append((layer, adapter))
        for (rank, tol), group in groups.items():
            _initialize(group, rank, tol, self.options.backend)


_open = threading.local()


def _queue() -> _Queue | None:
    return getattr(_open, "queue", None)


def inject_adapter(
    options: Options, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> Any:
    """PEFT's `inject_adapter`, with PiSSA layers initialised together at its end."""
    outer = _queue()
    queue = _open.queue = _Queue(options)
    try:
        result = original(model, *args, **kwargs)
        queue.flush()
    finally:
        _open.queue = outer
    return result


def update_layer(
    options: Options, original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any
) -> None:
    """PEFT's `update_layer` of linear layers, whose factors PiSSA will set."""
    del options
    config = kwargs["config"] if "config" in kwargs else args[3]
    init = config.init_lora_weights
    _open.is_unfilled = isinstance(init, str) and init.startswith("pissa")
    try:
        original(layer, *args, **kwargs)
    finally:
        _open.is_unfilled = False


def reset_parameters(
    options: Options, original: Callable[..., Any], linear: torch.nn.Linear
) -> None:
    """A new linear layer's first values; none for factors that PiSSA is about to set."""
    del options
    # PiSSA leaves a bias as it came.
    if linear.bias is not None or not getattr(_open, "is_unfilled", False):
        original(linear)


def move_adapter(
    options: Options,
    original: Callable[..., Any],
    layer: Any,
    adapter_name: str,
    device: torch.device | None = None,
) -> None:
    """PEFT's move of a new adapter beside its weight, where queued factors are already."""
    del options
    queue = _queue()
    if queue is None or device is not None or not queue.is_last(layer, adapter_name):
        original(layer, adapter_name, device)


def replace_module(
    options: Options,
    original: Callable[..., Any],
    model: Any,
    parent: Any,
    child_name: str,
    new_module: Any,
    child: Any,
) -> None:
    """PEFT's replacement of a layer by its adapted one, without a second move of its factors."""
    del options
    queue = _queue()
    # A module that has just been made has one adapter.
    name = next(iter(getattr(new_module, "lora_B", ())), None)
    if queue is not None and name is not None and queue.is_last(new_module, name):
        setattr(parent, child_name, new_module)
    else:
        original(model, parent, child_name, new_module, child)


def pissa_init(
    options: Options, original: Callable[..., Any], layer: Any, adapter: str, init: str
) -> None:
    """PEFT's `pissa_init`, now or when the queue is flushed."""
    # The factors are there; what variants make after them starts as torch has it.
    _open.is_unfilled = False
    weight = layer.get_base_layer().weight
    name, _, niter = init.partition("_niter_")
    is_covered = (
        name == "pissa"
        and (init == "pissa" or niter.isdigit())
        and weight.dim() == 2
        and weight.dtype in _DTYPES
        and not weight.is_meta
        and not layer.lora_A[adapter].weight.is_meta
        and layer.r[adapter] <= min(weight.shape)
    )
    if not is_covered:
        original(layer, adapter, init)
        return
    tol = options.tol if init == "pissa" else _FAST * options.tol
    queue = _queue()
    # Variants such as DoRA look at the factors next, and DeepSpeed takes the gathered weight away.
    if queue is not None and adapter not in layer.lora_variant and not hasattr(weight, "ds_id"):
        queue.add(layer, adapter, tol)
        return
    with torch.no_grad():
        _allocate(layer, adapter, torch.float32)
        _initialize([(layer, adapter)], layer.r[adapter], tol, options.backend)


def _allocate(layer: Any, adapter: str, dtype: torch.dtype) -> None:
    """Empty factors beside their weight."""
    weight = layer.get_base_layer().weight.data
    for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
        factor.weight.data = weight.new_empty(factor.weight.shape, dtype=dtype)


def _initialize(group: list[tuple[Any, str]], rank: int, tol: float, backend: str) -> None:
    """Decompose the weights of layers with one rank, and set factors and weights."""
    # No name for the list: each old weight is to be free again once it has been replaced.
    found = truncated_svd(
        [layer.get_base_layer().weight.data for layer, _ in group], rank, tol=tol, backend=backend
    )
    alike: dict[Any, list[tuple[Any, str, SVD]]] = {}
    for (layer, adapter), svd in zip(group, found, strict=True):
        key = svd.U.shape, svd.V.shape, svd.U.device, layer.fan_in_fan_out, layer.scaling[adapter]
        alike.setdefault(key, []).append((layer, adapter, svd))
    for layers in alike.values():
        _apply(layers)


def _apply(layers: list[tuple[Any, str, SVD]]) -> None:
    """Give layers of one shape their principal parts, and their base weights the rest."""
    first, adapter, _ = layers[0]
    scaling, is_flipped = first.scaling[adapter], first.fan_in_fan_out
    root = (torch.stack([svd.S for _, _, svd in layers]) / scaling).sqrt()[:, None]
    left = torch.stack([svd.U for _, _, svd in layers]) * root
    right = torch.stack([svd.V for _, _, svd in layers]) * root
    # A transposed base weight has the same triplets with U and V exchanged.
    B, A = (right, left) if is_flipped else (left, right)
    to_A = [layer.lora_A[adapter].weight.data for layer, adapter, _ in layers]
    to_B = [layer.lora_B[adapter].weight.data for layer, adapter, _ in layers]
    torch._foreach_copy_(to_A, list(A.mT.unbind()))
    torch._foreach_copy_(to_B, list(B.unbind()))
    for (layer, _, _), lora_A, lora_B in zip(layers, to_A, to_B, strict=True):
        base = layer.get_base_layer().weight
        left, right = (lora_A.T, lora_B.T) if is_flipped else (lora_B, lora_A)
        base.data = _less(base.data, left, right, scaling)


def _less(W: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scaling: float) -> torch.Tensor:
    """`W - scaling * left @ right`, rounded once; the factors are those that the layer adds back.

    Read and written as 16-bit numbers on a GPU, where the sums inside are float32 all the same: of
    a large model, the detour over a float32 copy moves 130 GB.
    """
    if W.dtype == torch.float32 or (W.is_cuda and left.dtype == right.dtype == W.dtype):
        return torch.addmm(W, left.to(W.dtype), right.to(W.dtype), alpha=-scaling)
    return W.float().addmm_(left.float(), right.float(), alpha=-scaling).to(W.dtype)
