# SPDX-License-Identifier: Apache-2.0
"""Transfer of an adapter's factors from one base weight to another: the methods themselves."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import torch

from . import ops
from ._factors import check_factors, recompress
from ._rotation import rotate_subspace
from .svd_types import SVD

METHODS = ("lorax", "prolora", "transport", "copy")


class UnvalidatedTransferWarning(UserWarning):
    """Source and target differ in shape: the published formula is followed, unproven."""


@overload
def transfer_lora(
    lora_B: torch.Tensor,
    lora_A: torch.Tensor,
    target: SVD,
    source: SVD | None = ...,
    method: str = ...,
    *,
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
@overload
def transfer_lora(
    lora_B: Sequence[torch.Tensor],
    lora_A: Sequence[torch.Tensor],
    target: Sequence[SVD],
    source: Sequence[SVD] | None = ...,
    method: str = ...,
    *,
    backend: str = ...,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]: ...
def transfer_lora(
    lora_B: torch.Tensor | Sequence[torch.Tensor],
    lora_A: torch.Tensor | Sequence[torch.Tensor],
    target: SVD | Sequence[SVD],
    source: SVD | Sequence[SVD] | None = None,
    method: str = "lorax",
    *,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor] | tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Factors of an adapter on another base weight, of the same rank; no dense update is formed.

    With `P = U U^T`, `Q = I - P` of the source (s) and the target (t), and primes for `V`:

    - "lorax": `dW_t = P_t dW P_t'`. Where shapes differ, coordinates are copied index by index,
      `dW_t = U_t (U_s^T dW V_s) V_t^T`, with the signs that `truncated_svd` fixes.
    - "prolora": `dW_t = P_t P_s dW P_s' P_t' + Q_t Q_s dW Q_s' Q_t'`, rank `2r`, recompressed to
      the best rank `r`.
    - "transport": `dW_t = R_U dW R_V^T`, with `R_U` the smallest rotation that carries
      `span(U_s)` onto `span(U_t)` and `R_V` likewise: no energy is lost, and it is copy where the
      subspaces agree.
    - "copy": the factors as they are.

    Args:
        lora_B: `(m, r)`, any floating dtype; or a list, a layer an entry.
        lora_A: `(r, n)`; or a list.
        target: truncated SVD of the target's weight `(m_t, n_t)`; or a list.
        source: truncated SVD of the source's weight `(m, n)`; needed for "prolora" and "transport"
            and where shapes differ. Where ranks differ, the leading ones of both are used.
        method: "lorax", "prolora", "transport" or "copy".
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        `lora_B` `(m_t, r)` and `lora_A` `(r, n_t)`, or lists, in the dtypes that came in.

    Raises:
        ValueError: unknown method, shapes that do not fit, or a source that is needed and missing.
        RuntimeError: a backend named explicitly cannot run here.

    Warns:
        UnvalidatedTransferWarning: shapes differ; no one has shown that this case works.

    Example:
        >>> from lorax_kernels import truncated_svd
        >>> svd = truncated_svd(torch.randn(8, 6), rank=6)
        >>> B, A = transfer_lora(torch.randn(8, 2), torch.randn(2, 6), svd)
        >>> B.shape, A.shape
        (torch.Size([8, 2]), torch.Size([2, 6]))

    "lorax" is the transfer of LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559), "prolora"
    that of ProLoRA (ICML 2025, arXiv 2506.04244); "transport" is this project's. docs/methods.md
    compares them.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}; got {method!r}")
    if isinstance(lora_B, torch.Tensor):
        if (
            not isinstance(lora_A, torch.Tensor)
            or not isinstance(target, SVD)
            or not (source is None or isinstance(source, SVD))
        ):
            raise ValueError("lora_B, lora_A, target and source must be all single or all lists")
        sources = None if source is None else [source]
        B, A = transfer_lora([lora_B], [lora_A], [target], sources, method, backend=backend)
        return B[0], A[0]
    layers = _layers(lora_B, lora_A, target, source, method)
    if method == "copy":
        return [B.clone() for B in layers.B], [A.clone() for A in layers.A]
    if method == "prolora":
        return _prolora(layers, backend)
    if method == "transport":
        return _transport(layers, backend)
    return _lorax(layers, backend)


@dataclass(frozen=True)
class _Layers:
    """The arguments, checked, as lists."""

    B: list[torch.Tensor]
    A: list[torch.Tensor]
    target: list[SVD]
    source: list[SVD]  # empty where the method does without
    reshaped: list[bool]  # the layers whose weight has another shape in the target


def _layers(
    lora_B: Sequence, lora_A: object, target: object, source: object, method: str
) -> _Layers:
    if not isinstance(lora_A, Sequence) or not isinstance(target, Sequence):
        raise ValueError("lora_B, lora_A, target and source must be all single or all lists")
    sources = None if source is None else list(source)  # type: ignore[call-overload]
    lengths = [len(lora_B), len(lora_A), len(target)] + ([] if sources is None else [len(sources)])
    if len(set(lengths)) > 1:
        raise ValueError(f"one entry a layer is needed in every list, got lengths {lengths}")
    check_factors(lora_B, lora_A)
    for i, (B, A) in enumerate(zip(lora_B, lora_A, strict=True)):
        if sources is not None:
            svd = sources[i]
            if (svd.U.shape[0], svd.V.shape[0]) != (B.shape[0], A.shape[1]):
                raise ValueError(
                    f"layer {i}: the adapter's update is {(B.shape[0], A.shape[1])}, the source's "
                    f"weight {(svd.U.shape[0], svd.V.shape[0])}; they must be of one shape"
                )
    reshaped = [
        (B.shape[0], A.shape[1]) != (svd.U.shape[0], svd.V.shape[0])
        for B, A, svd in zip(lora_B, lora_A, target, strict=True)
    ]
    layers = _Layers(list(lora_B), list(lora_A), list(target), sources or [], reshaped)
    changed = [i for i, other in enumerate(reshaped) if other]
    if changed and method != "lorax":
        i = changed[0]
        raise ValueError(
            f"method {method!r} needs source and target of one shape; layer {i} goes from "
            f"{(layers.B[i].shape[0], layers.A[i].shape[1])} to "
            f"{(layers.target[i].U.shape[0], layers.target[i].V.shape[0])}; only 'lorax' is defined"
        )
    if sources is None and (changed or method in ("prolora", "transport")):
        why = "where shapes differ" if changed else f"by method {method!r}"
        raise ValueError(f"the source's SVD is needed {why}; give source=")
    if changed:
        warnings.warn(
            f"{len(changed)} layers change shape: coordinates are copied index by index, as "
            "published, but no one has shown that this carries what an adapter learned",
            UnvalidatedTransferWarning,
            stacklevel=4,
        )
    return layers


def _lorax(layers: _Layers, backend: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    read = []
    for i, svd in enumerate(layers.target):
        if layers.reshaped[i]:
            k = min(svd.rank, layers.source[i].rank)
            read.append((layers.source[i].truncate(k), svd.truncate(k)))
        else:
            read.append((svd, svd))
    B = ops.project(layers.B, [s.U for s, _ in read], [t.U for _, t in read], backend=backend)
    columns = [A.mT for A in layers.A]
    A = ops.project(columns, [s.V for s, _ in read], [t.V for _, t in read], backend=backend)
    return B, [a.mT.contiguous() for a in A]


def _prolora(layers: _Layers, backend: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    blocks_B = [B.float() for B in layers.B]
    blocks_A = [A.float().mT for A in layers.A]

    def both(
        blocks: list[torch.Tensor], source: list[torch.Tensor], target: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """`P_t P_s X` and `Q_t Q_s X` for every block `X`."""
        within = ops.project(blocks, source, backend=backend)
        beyond = [X - inside for X, inside in zip(blocks, within, strict=True)]
        # Side by side, so that each target basis is read once for both.
        sides = [torch.cat(pair, dim=1) for pair in zip(within, beyond, strict=True)]
        pairs = [x.tensor_split(2, dim=1) for x in ops.project(sides, target, backend=backend)]
        kept = [inside for inside, _ in pairs]
        return kept, [X - lost for X, (_, lost) in zip(beyond, pairs, strict=True)]

    inside_B, outside_B = both(blocks_B, [s.U for s in layers.source], [t.U for t in layers.target])
    inside_A, outside_A = both(blocks_A, [s.V for s in layers.source], [t.V for t in layers.target])
    wide = [torch.cat(pair, dim=1) for pair in zip(inside_B, outside_B, strict=True)]
    tall = [torch.cat(pair, dim=1).mT for pair in zip(inside_A, outside_A, strict=True)]
    ranks = [B.shape[1] for B in layers.B]
    return recompress(wide, tall, layers.B, layers.A, ranks, backend)


def _transport(layers: _Layers, backend: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    pairs = []
    for source, target in zip(layers.source, layers.target, strict=True):
        k = min(source.rank, target.rank)
        pairs.append((source.truncate(k), target.truncate(k)))
    B = rotate_subspace(layers.B, [s.U for s, _ in pairs], [t.U for _, t in pairs], backend)
    columns = [A.mT for A in layers.A]
    A = rotate_subspace(columns, [s.V for s, _ in pairs], [t.V for _, t in pairs], backend)
    return B, [a.mT.contiguous() for a in A]


def transfer_core(C: torch.Tensor, source: SVD, target: SVD) -> torch.Tensor:
    """Core of a LoRA-X adapter `dW = U C V^T` on another base weight.

    `C_t = (U_t^T U_s) C (V_s^T V_t)`, dense even where `C` was diagonal. Where shapes differ the
    published formula is the index copy `C_t = C`.

    Args:
        C: `(k,)` for a diagonal core or `(k, k)`; any floating dtype.
        source: truncated SVD of the source's weight at rank `k`.
        target: truncated SVD of the target's weight at rank `k_t`.

    Returns:
        `(k_t, k_t)`, in C's dtype, computed in float32. Where shapes differ, C itself, cut or
        padded with zeros to `k_t`.

    Raises:
        ValueError: `C` does not fit the source's rank.

    Warns:
        UnvalidatedTransferWarning: shapes differ.

    Example:
        >>> from lorax_kernels import truncated_svd
        >>> svd = truncated_svd(torch.randn(8, 6), rank=3)
        >>> transfer_core(torch.ones(3), svd, svd).shape
        torch.Size([3, 3])

    The method is LoRA-X (Farhadzadeh et al., ICLR 2025, arXiv 2501.16559).
    """
    k = source.rank
    if C.shape not in ((k,), (k, k)):
        raise ValueError(
            f"the core must be ({k},) or ({k}, {k}), as the source's rank; got {tuple(C.shape)}"
        )
    core = (torch.diag(C) if C.dim() == 1 else C).float()
    if (source.U.shape[0], source.V.shape[0]) != (target.U.shape[0], target.V.shape[0]):
        warnings.warn(
            "source and target differ in shape: the core is copied index by index, as published, "
            "but no one has shown that this carries what an adapter learned",
            UnvalidatedTransferWarning,
            stacklevel=2,
        )
        both = min(k, target.rank)
        copied = core.new_zeros(target.rank, target.rank)
        copied[:both, :both] = core[:both, :both]
        return copied.to(C.dtype)
    left = target.U.mT @ source.U
    right = source.V.mT @ target.V
    return (left @ core @ right).to(C.dtype)
