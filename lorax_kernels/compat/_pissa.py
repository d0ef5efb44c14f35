# SPDX-License-Identifier: Apache-2.0
"""PEFT's PiSSA initialisation: many layers in one truncated SVD.

PEFT initialises layer by layer while it builds the model. Inside `inject_adapter` the layers are
collected instead, and decomposed in batches of equal shapes when all of them are there. The random
numbers that factors are born with and that nobody sees are not drawn.
"""

import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

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
        if weight.data_ptr() in self.weights:
            self.flush()
        self.entries.append((layer, adapter, tol))
        self.weights.add(weight.data_ptr())
        # Where PEFT moves them next and in the dtype that it gives them: empty, they cost nothing.
        for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
            factor.weight.data = torch.empty_like(factor.weight.data, **_place_of(weight))

    @torch.no_grad()
    def flush(self) -> None:
        """Initialise what waits."""
        entries, self.entries = self.entries, []
        self.weights.clear()
        groups: dict[tuple[int, float], list[tuple[Any, str]]] = {}
        for layer, adapter, tol in entries:
            groups.setdefault((layer.r[adapter], tol), []).append((layer, adapter))
        for (rank, tol), group in groups.items():
            matrices = [layer.get_base_layer().weight.data for layer, _ in group]
            found = truncated_svd(matrices, rank, tol=tol, backend=self.options.backend)
            for (layer, adapter), svd in zip(group, found, strict=True):
                _apply(layer, adapter, svd)
                # As PEFT did to the factors that are replaced now.
                place = _place_of(layer.get_base_layer().weight)
                for factor in (layer.lora_A[adapter], layer.lora_B[adapter]):
                    factor.weight.data = factor.weight.data.to(**place)


def _place_of(weight: torch.Tensor) -> dict[str, Any]:
    """Device and dtype that PEFT gives the factors beside a weight."""
    return {"device": weight.device, "dtype": weight.dtype}


_open = threading.local()


def inject_adapter(
    options: Options, original: Callable[..., Any], model: Any, *args: Any, **kwargs: Any
) -> Any:
    """PEFT's `inject_adapter`, with PiSSA layers initialised together at its end."""
    outer = getattr(_open, "queue", None)
    queue = _open.queue = _Queue(options)
    try:
        result = original(model, *args, **kwargs)
        queue.flush()
    finally:
        _open.queue = outer
    return result


class _Unfilled(TorchFunctionMode):
    """Leaves the weights of new linear layers as they were allocated."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.init.kaiming_uniform_:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def update_layer(
    options: Options, original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any
) -> None:
    """PEFT's `update_layer` of linear layers, whose factors PiSSA will set."""
    del options
    config = kwargs["config"] if "config" in kwargs else args[3]
    init = config.init_lora_weights
    with _Unfilled() if isinstance(init, str) and init.startswith("pissa") else nullcontext():
        original(layer, *args, **kwargs)


@torch.no_grad()
def pissa_init(
    options: Options, original: Callable[..., Any], layer: Any, adapter: str, init: str
) -> None:
    """PEFT's `pissa_init`, now or when the queue is flushed."""
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
    queue = getattr(_open, "queue", None)
    # Variants such as DoRA look at the factors next, and DeepSpeed takes the gathered weight away.
    if queue is not None and adapter not in layer.lora_variant and not hasattr(weight, "ds_id"):
        queue.add(layer, adapter, tol)
        return
    svd = truncated_svd(weight.data, layer.r[adapter], tol=tol, backend=options.backend)
    _apply(layer, adapter, svd)


def _apply(layer: Any, adapter: str, svd: SVD) -> None:
    """Give the layer its principal part, and its base weight the rest."""
    base = layer.get_base_layer().weight
    # A transposed base weight has the same triplets with U and V exchanged.
    U, V = (svd.V, svd.U) if layer.fan_in_fan_out else (svd.U, svd.V)
    scaling = layer.scaling[adapter]
    root = (svd.S / scaling).sqrt()
    lora_A, lora_B = (V * root).T.contiguous(), U * root
    layer.lora_A[adapter].weight.data = lora_A
    layer.lora_B[adapter].weight.data = lora_B
    left, right = (lora_A.T, lora_B.T) if layer.fan_in_fan_out else (lora_B, lora_A)
    if base.dtype == torch.float32:
        base.data = torch.addmm(base.data, left, right, alpha=-scaling)
    else:
        base.data = base.data.float().addmm_(left, right, alpha=-scaling).to(base.dtype)
