# SPDX-License-Identifier: Apache-2.0
"""PEFT's PiSSA initialisation: many layers in one truncated SVD.

PEFT initialises layer by layer while it builds the model. Inside `inject_adapter` the layers are
collected instead, and decomposed in batches of equal shapes when all of them are there.
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


@dataclass
class _Queue:
    """Layers that wait for their initialisation, and the weights that they will change."""

    options: Options
    entries: list[tuple[Any, str]] = field(default_factory=list)
    weights: set[int] = field(default_factory=set)

    def add(self, layer: Any, adapter: str) -> None:
        """Queue a layer; one whose weight is queued already has to see it changed first."""
        weight = layer.get_base_layer().weight.data_ptr()
        if weight in self.weights:
            self.flush()
        self.entries.append((layer, adapter))
        self.weights.add(weight)

    @torch.no_grad()
    def flush(self) -> None:
        """Initialise what waits."""
        entries, self.entries = self.entries, []
        self.weights.clear()
        ranks = sorted({layer.r[adapter] for layer, adapter in entries})
        for rank in ranks:
            group = [(x, adapter) for x, adapter in entries if x.r[adapter] == rank]
            matrices = [layer.get_base_layer().weight.data for layer, _ in group]
            found = truncated_svd(
                matrices, rank, tol=self.options.tol, backend=self.options.backend
            )
            for (layer, adapter), svd in zip(group, found, strict=True):
                _apply(layer, adapter, svd)
                # PEFT did this to the factors that are replaced now.
                layer._move_adapter_to_device_of_base_layer(adapter)


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
    queue = getattr(_open, "queue", None)
    # Variants such as DoRA look at the factors next, and DeepSpeed takes the gathered weight away.
    if queue is not None and adapter not in layer.lora_variant and not hasattr(weight, "ds_id"):
        queue.add(layer, adapter)
        return
    svd = truncated_svd(weight.data, layer.r[adapter], tol=options.tol, backend=options.backend)
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
    principal = lora_B @ lora_A
    if layer.fan_in_fan_out:
        principal = principal.T
    base.data = (base.data.float() - scaling * principal).to(base.dtype)
