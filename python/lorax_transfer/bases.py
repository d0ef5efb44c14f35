# SPDX-License-Identifier: Apache-2.0
"""Truncated bases of weights, and a cache of them by content.

Whoever moves many adapters between the same two models needs the same bases each time. A cached
basis is a safetensors file of float32 factors: in bf16 its rounding, 0.4 %, would exceed the drift
between related checkpoints.
"""

import hashlib
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

import lorax_kernels as lk

from .atomic import atomic_file
from .errors import OutputError

_log = logging.getLogger(__name__)

# Raised when the meaning of a cached file changes; the kernels' version is in the key too.
_FORMAT = 1


@dataclass(frozen=True)
class Basis:
    """The leading singular triplets of one weight.

    Attributes:
        svd: the triplets.
        is_cached: whether they were read from the cache.
    """

    svd: lk.SVD
    is_cached: bool = False


@dataclass(frozen=True)
class BasisMaker:
    """Computes bases, or finds them where it kept them.

    Attributes:
        tol: relative projector error to reach.
        backend: backend of the kernels.
        workspace: bytes of temporaries that a batch may take.
        cache: directory to keep bases in; None to keep none.
        is_exact: decompose in float64 and iterate nothing, so that single vectors, and not only
            the subspace, are the same on every device.
    """

    tol: float
    backend: str = "auto"
    workspace: int = 4 << 30
    cache: Path | None = None
    is_exact: bool = False

    def make(
        self,
        weights: Sequence[torch.Tensor],
        ranks: Sequence[int],
        energy: float | None = None,
        start: Sequence[lk.SVD | None] | None = None,
    ) -> list[Basis]:
        """Bases of several weights.

        Args:
            weights: matrices `(m, n)` of any shapes.
            ranks: triplets to keep of each; at most that many where an energy decides.
            energy: share of each weight to keep, or None.
            start: for each weight a basis of a similar one to start from, or None.

        Returns:
            A basis for each weight, on its device.
        """
        start = start or [None] * len(weights)
        found: dict[int, Basis] = {}
        paths: dict[int, Path] = {}
        if self.cache is not None:
            for i, (weight, rank) in enumerate(zip(weights, ranks, strict=True)):
                paths[i] = self.cache / f"{self._key(weight, rank, energy)}.safetensors"
                svd = _read(paths[i], weight)
                if svd is not None:
                    found[i] = Basis(svd, is_cached=True)
        missing = [i for i in range(len(weights)) if i not in found]
        for rank in sorted({ranks[i] for i in missing}):
            group = [i for i in missing if ranks[i] == rank]
            for part in self._parts(weights, group):
                svds = self._compute(
                    [weights[i] for i in part], rank, energy, [start[i] for i in part]
                )
                found.update({i: Basis(svd) for i, svd in zip(part, svds, strict=True)})
                for i in part:
                    if i in paths:
                        _write(paths[i], found[i].svd)
        return [found[i] for i in range(len(weights))]

    def _parts(self, weights: Sequence[torch.Tensor], group: list[int]) -> list[list[int]]:
        """A group cut so that copies in float64 take no more than the workspace."""
        if not self.is_exact:
            return [group]
        parts: list[list[int]] = [[]]
        size = 0
        for i in sorted(group, key=lambda i: tuple(weights[i].shape)):
            size += 8 * weights[i].numel()
            if parts[-1] and size > self.workspace:
                parts.append([])
                size = 8 * weights[i].numel()
            parts[-1].append(i)
        return parts

    def _compute(
        self,
        weights: list[torch.Tensor],
        rank: int,
        energy: float | None,
        start: list[lk.SVD | None],
    ) -> list[lk.SVD]:
        with warnings.catch_warnings():
            # Every basis carries its error, and the report names those above the tolerance.
            warnings.simplefilter("ignore", lk.ConvergenceWarning)
            if self.is_exact:
                # A block as wide as the matrix is the exact path.
                widest = max(min(weight.shape) for weight in weights)
                return lk.truncated_svd(
                    [weight.double() for weight in weights],
                    rank,
                    energy=energy,
                    tol=self.tol,
                    oversample=widest,
                    backend=self.backend,
                    workspace=self.workspace,
                )
            return lk.truncated_svd(
                weights,
                rank,
                energy=energy,
                tol=self.tol,
                init=start,
                backend=self.backend,
                workspace=self.workspace,
            )

    def _key(self, weight: torch.Tensor, rank: int, energy: float | None) -> str:
        digest = hashlib.sha256()
        what = [_FORMAT, lk.__version__, list(weight.shape), str(weight.dtype)]
        what += [rank, energy, self.tol] + (["exact"] if self.is_exact else [])
        digest.update(json.dumps(what).encode())
        data = weight.detach().cpu().contiguous()
        digest.update(data.flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _read(path: Path, weight: torch.Tensor) -> lk.SVD | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            # Cloned, so that the file may be replaced or deleted.
            U, S, V = (file.get_tensor(name).clone() for name in ("U", "S", "V"))
            facts = file.metadata()
        if U.shape != (weight.shape[0], len(S)) or V.shape != (weight.shape[1], len(S)):
            raise ValueError(f"shapes {tuple(U.shape)}, {tuple(S.shape)}, {tuple(V.shape)}")
        if not all(bool(x.isfinite().all()) for x in (U, S, V)):
            raise ValueError("it holds NaN or Inf")
        to = weight.device
        error, passes = float(facts["error"]), int(facts["passes"])
        return lk.SVD(U.to(to), S.to(to), V.to(to), error, passes, facts["path"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        _log.warning("%s cannot be used (%s) and is computed again.", path, error)
        return None


def _write(path: Path, svd: lk.SVD) -> None:
    facts = {"error": repr(float(svd.error)), "passes": str(svd.passes), "path": str(svd.path)}
    tensors = {name: getattr(svd, name).cpu().contiguous().clone() for name in ("U", "S", "V")}
    try:
        with atomic_file(path) as temporary:
            save_file(tensors, temporary, metadata=facts)
    except (OSError, SafetensorError) as error:
        raise OutputError(
            f"cannot write the cached basis {path}: {error}; name another directory with --cache."
        ) from error
