# SPDX-License-Identifier: Apache-2.0
"""PEFT: merging, conversion and LoftQ; PiSSA has its own module."""

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..product import svd_product
from ..svd import truncated_svd
from ..svd_types import SVD
from . import _pissa
from ._switch import Options, Patch, Tool

# Before this version PEFT multiplied every adapter with its scaling twice here.
_SINGLE_SCALING = (0, 21)
# Where the share of energy decides the rank, it is looked for in the leading triplets first.
_FIRST_RANK = 64


@torch.no_grad()
def _merge(
    options: Options,
    original: Callable[..., Any],
    model: Any,
    combination_type: str,
    adapters: Sequence[str],
    weights: Sequence[float],
    new_rank: int,
    target: Any,
    target_lora_A: torch.Tensor,
    target_lora_B: torch.Tensor,
    density: float,
    majority_sign_method: str,
    clamp: float | None = None,
    full_matrices: bool = True,
    driver: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`lora_A` and `lora_B` of a weighted sum of adapters in one layer.

    A linear sum is decomposed through its factors, exactly; what prunes elements has no factors,
    and gets a truncated SVD. Left to the original: clamping, which depends on the signs of the
    singular vectors, a driver asked for by name, and layers with their own delta weight.
    """
    present = [
        (name, weight)
        for name, weight in zip(adapters, weights, strict=True)
        if name in target.lora_A or name in target.lora_embedding_A
    ]
    is_known = combination_type in _MIXERS and clamp is None and driver is None
    if not (is_known and present and _is_plain(target)):
        return original(
            model,
            combination_type,
            adapters,
            weights,
            new_rank,
            target,
            target_lora_A,
            target_lora_B,
            density,
            majority_sign_method,
            clamp,
            full_matrices=full_matrices,
            driver=driver,
        )
    names = [name for name, _ in present]
    scaled = [weight * _again(target, name) for name, weight in present]
    pairs = [_factors(target, name) for name in names]
    # The dtype of the parts: the new adapter is still in the base weight's, which may be narrower.
    dtype = pairs[0][1].dtype
    if combination_type == "svd":
        working = torch.float64 if pairs[0][0].dtype == torch.float64 else torch.float32
        B = [
            B.to(working) * (weight * target.scaling[name])
            for (_, B), name, weight in zip(pairs, names, scaled, strict=True)
        ]
        A = [A.to(working) for A, _ in pairs]
        B_all, A_all = torch.cat(B, dim=1), torch.cat(A)
        keep = min(new_rank, B_all.shape[0], *A_all.shape)
        svd = svd_product(B_all, A_all, keep, backend=options.backend)
    else:
        deltas = [target.get_delta_weight(name) for name in names]
        mix = getattr(importlib.import_module("peft.tuners.lora.model"), _MIXERS[combination_type])
        arguments = (density, majority_sign_method) if "ties" in combination_type else (density,)
        delta = mix(deltas, torch.tensor(scaled).to(deltas[0].device), *arguments)
        delta = delta.flatten(1)
        if target.lora_embedding_A or getattr(target, "fan_in_fan_out", False):
            delta = delta.T
        keep = min(new_rank, *delta.shape)
        svd = truncated_svd(delta, keep, tol=options.tol, backend=options.backend)
    rows = min(new_rank, *_sides(target_lora_B, target_lora_A))
    lora_A = _complete(svd.V, rows).T.contiguous().to(dtype)
    lora_B = target_lora_B.new_zeros(svd.U.shape[0], rows, dtype=dtype)
    lora_B[:, : svd.rank] = (svd.U * svd.S).to(dtype)
    if target_lora_B.dim() > 2:
        return lora_A.reshape(target_lora_A.shape), lora_B.reshape(target_lora_B.shape)
    return lora_A, lora_B


_MIXERS = {
    "svd": "task_arithmetic",
    "ties_svd": "ties",
    "dare_linear_svd": "dare_linear",
    "dare_ties_svd": "dare_ties",
    "magnitude_prune_svd": "magnitude_prune",
}


def _again(target: Any, name: str) -> float:
    """The second factor of the scaling that earlier versions apply."""
    # Not `importlib.metadata.version`, which parses a file: this runs for every layer.
    major, minor = importlib.import_module("peft").__version__.split(".")[:2]
    return 1.0 if (int(major), int(minor)) >= _SINGLE_SCALING else target.scaling[name]


def _is_plain(target: Any) -> bool:
    """Whether the delta weight is `scaling * B @ A` in stored orientation or its transpose."""
    layer = importlib.import_module("peft.tuners.lora.layer")
    own = type(target).get_delta_weight
    if own in (layer.Linear.get_delta_weight, layer.Embedding.get_delta_weight):
        return True
    # The original knows how to flatten the kernels of two dimensions, and no others.
    return (
        isinstance(target, layer.Conv2d)
        and own is layer.Conv2d.get_delta_weight
        and target.get_base_layer().groups == 1
    )


def _factors(target: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    if name in target.lora_A:
        A, B = target.lora_A[name].weight, target.lora_B[name].weight
    else:
        A, B = target.lora_embedding_A[name], target.lora_embedding_B[name]
    return A.detach().flatten(1), B.detach().flatten(1)


def _sides(B: torch.Tensor, A: torch.Tensor) -> tuple[int, int]:
    return B.shape[0], A.flatten(1).shape[1]


def _complete(V: torch.Tensor, columns: int) -> torch.Tensor:
    """V with orthonormal columns added: a dense SVD gives some for singular values of zero.

    With zeros in both factors these directions would never get a gradient again.
    """
    missing = columns - V.shape[1]
    if missing <= 0:
        return V
    generator = torch.Generator().manual_seed(0)
    more = torch.randn(V.shape[0], missing, generator=generator).to(V)
    Q = torch.linalg.qr(torch.cat([V, more], dim=1)).Q
    return torch.cat([V, Q[:, V.shape[1] :]], dim=1)


@torch.no_grad()
def _convert(
    options: Options,
    original: Callable[..., Any],
    module: Any,
    rank: float,
    adapter_name: str = "default",
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """`lora_A`, `lora_B` and rank that stand in for another method's delta weight in one layer.

    Left to the original: MiSS, which needs no SVD, shares of 1, whose rank is decided by rounding,
    ranks that do not fit, which it refuses, and compiled runs.
    """
    miss = importlib.import_module("peft.tuners.miss.layer")
    is_share = not isinstance(rank, int)
    if (
        isinstance(module, miss.MissLinear)
        or torch.compiler.is_compiling()
        or (is_share and not 0 < rank < 1)
    ):
        return original(module, rank, adapter_name)
    delta = module.get_delta_weight(adapter_name)
    if delta.dim() != 2 or (not is_share and not 1 <= rank <= min(delta.shape)):
        return original(module, rank, adapter_name)
    matrix = delta.float()
    svd = (
        _share(matrix, rank, options)
        if is_share
        else truncated_svd(matrix, int(rank), tol=options.tol, backend=options.backend)
    )
    lora_B = (svd.U * svd.S).to(delta.dtype)
    lora_A = svd.V.T.to(delta.dtype)
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    if isinstance(module.get_base_layer(), conv1d):
        lora_A, lora_B = lora_B.T, lora_A.T
    return lora_A.contiguous(), lora_B.contiguous(), svd.rank


def _share(matrix: torch.Tensor, energy: float, options: Options) -> SVD:
    """The smallest rank that holds a share of the energy, from as few triplets as will do."""
    total = float(torch.linalg.vector_norm(matrix, dtype=torch.float64) ** 2)
    rank, svd = _FIRST_RANK, None
    while svd is None or (
        float((svd.S.double() ** 2).sum()) < energy * total and svd.rank < min(matrix.shape)
    ):
        svd = truncated_svd(
            matrix, min(rank, *matrix.shape), tol=options.tol, backend=options.backend
        )
        rank *= 4
    kept = torch.cumsum(svd.S.double() ** 2, dim=0)
    return svd.truncate(min(int((kept < energy * total).sum()) + 1, svd.rank))


@torch.no_grad()
def _decompose(
    options: Options, original: Callable[..., Any], weight: torch.Tensor, reduced_rank: int = 32
) -> dict[str, Any]:
    """Balanced factors `L` and `R` of what quantisation left over, for LoftQ."""
    is_covered = weight.dim() == 2 and weight.is_floating_point() and 0 not in weight.shape
    if not (is_covered and 1 <= reduced_rank <= min(weight.shape)):
        return original(weight, reduced_rank)
    svd = truncated_svd(weight, reduced_rank, tol=options.tol, backend=options.backend)
    root, Vh = svd.S.sqrt(), svd.V.mT
    return {
        "L": svd.U * root,
        "R": (root[:, None] * Vh).contiguous(),
        "U": svd.U,
        "S": svd.S,
        "Vh": Vh,
        "reduced_rank": reduced_rank,
    }


TOOL = Tool(
    "peft",
    ("0.20.0", "0.21.0", "0.21.1", "0.21.2"),
    (
        Patch(
            "peft.tuners.lora.layer:LoraLayer.pissa_init",
            "init_lora_weights='pissa': the leading triplets, to tol; 'pissa_niter_N': to 10 tol",
            _pissa.pissa_init,
        ),
        Patch(
            "peft.tuners.lora.layer:LoraLayer.update_layer",
            "factors that PiSSA sets are not filled with random numbers before",
            _pissa.update_layer,
        ),
        Patch(
            "torch.nn.modules.linear:Linear.reset_parameters",
            "nothing, but for these factors",
            _pissa.reset_parameters,
            tool="peft",
        ),
        Patch(
            "peft.tuners.tuners_utils:BaseTunerLayer._move_adapter_to_device_of_base_layer",
            "factors that PiSSA allocated beside their weight are not moved there once more",
            _pissa.move_adapter,
        ),
        Patch(
            "peft.tuners.lora.model:LoraModel._replace_module",
            "the same",
            _pissa.replace_module,
        ),
        Patch(
            "peft.tuners.lora.model:LoraModel.inject_adapter",
            "PiSSA layers of equal shapes are decomposed together once all are there",
            _pissa.inject_adapter,
        ),
        Patch(
            "peft.tuners.lora.model:LoraModel._svd_generalized_task_arithmetic_weighted_adapter",
            "add_weighted_adapter with combination_type '...svd': exactly, from the factors, where "
            "the combination is linear; to tol where it prunes",
            _merge,
        ),
        Patch(
            "peft.tuners.lora.conversion:_convert_module_to_lora",
            "convert_to_lora and save_as_lora: the leading triplets, to tol",
            _convert,
        ),
        Patch(
            "peft.utils.loftq_utils:_low_rank_decomposition",
            "LoftQ (loftq_init, replace_lora_weights_loftq): the leading triplets, to tol",
            _decompose,
        ),
    ),
)
