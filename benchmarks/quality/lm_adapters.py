# SPDX-License-Identifier: Apache-2.0
"""Adapters that train side by side: ordinary LoRA, and LoRA-X with its kinds of core.

A form says which parameters a layer has, what it adds to the layer's output, and the factors `B A`
of its update. Parameters carry a leading dimension of groups: one adapter each.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Lora:
    """`dW = scale B A`, started as PEFT does: A uniform, B zero."""

    sizes: dict  # name -> (m, n)
    rank: int = 16
    scale: float = 2.0
    kind: str = "lora"

    def layers(self):
        """Names of the layers that it is on."""
        return self.sizes.keys()

    def size(self):
        """Trained numbers."""
        return sum(self.rank * (m + n) for m, n in self.sizes.values())

    def parameter_shapes(self):
        shapes = {}
        for name, (m, n) in self.sizes.items():
            shapes[f"{name}.A"] = (self.rank, n)
            shapes[f"{name}.B"] = (m, self.rank)
        return shapes

    def start(self, name, shape, generator):
        """Starting values of one parameter of one adapter."""
        if name.endswith(".B"):
            return torch.zeros(shape)
        return (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(shape[1])

    def add(self, name, base, x, leaves):
        """`base + x dW^T` for `base` `(groups, rows, m)` and `x` `(groups, rows, n)`."""
        thin = torch.bmm(x, leaves[f"{name}.A"].mT)
        return torch.baddbmm(base, thin, leaves[f"{name}.B"].mT, alpha=self.scale)

    def factors(self, name, values):
        """`B`, `A` of the update, scale included; and no core."""
        return self.scale * values[f"{name}.B"], values[f"{name}.A"]


@dataclass(frozen=True)
class LoraX:
    """`dW = scale U C V^T` in the leading subspace of the base weight; only C is trained.

    Attributes:
        bases: name -> truncated SVD of the base weight at the rank of the core.
        core: "diagonal", "full", or "banded" (entries at most `band` off the diagonal).
        sigma_power: `a` of `U S^a C S^a V^T`, with S divided by its root mean square.
    """

    bases: dict
    core: str = "full"
    scale: float = 1.0
    sigma_power: float = 0.0
    band: int = 0
    kind: str = "lorax"
    _thin: dict = field(default_factory=dict)

    def layers(self):
        """Names of the layers that it is on."""
        return self.bases.keys()

    def prepare(self, device, dtype):
        """Hold the bases where and as the forward pass needs them."""
        for name, svd in self.bases.items():
            U, V = self._frame(name)
            self._thin[name] = (
                U.to(device, dtype).mT.contiguous(),
                V.to(device, dtype).contiguous(),
            )
            if self.core == "banded":
                at = torch.arange(svd.rank, device=device)
                self._thin[svd.rank] = ((at[:, None] - at).abs() <= self.band).to(dtype)
        return self

    def _weight(self, svd):
        return (svd.S / svd.S.square().mean().sqrt()) ** self.sigma_power

    def _frame(self, name):
        svd = self.bases[name]
        weight = self._weight(svd)
        return svd.U * weight, svd.V * weight

    def size(self):
        """Trained numbers."""
        ranks = [svd.rank for svd in self.bases.values()]
        if self.core == "diagonal":
            return sum(ranks)
        if self.core == "full":
            return sum(k * k for k in ranks)
        bands = [(k, min(self.band, k - 1)) for k in ranks]
        return sum((2 * b + 1) * k - b * (b + 1) for k, b in bands)

    def parameter_shapes(self):
        return {
            f"{name}.C": (svd.rank,) if self.core == "diagonal" else (svd.rank, svd.rank)
            for name, svd in self.bases.items()
        }

    def start(self, name, shape, generator):
        """Zero: the adapter starts as nothing."""
        del name, generator
        return torch.zeros(shape)

    def add(self, name, base, x, leaves):
        """`base + x dW^T`, without forming dW."""
        U, V = self._thin[name]
        C = leaves[f"{name}.C"]
        thin = x @ V
        if self.core == "diagonal":
            thin = thin * C[:, None]
        else:
            if self.core == "banded":
                C = C * self._thin[C.shape[-1]]
            thin = torch.bmm(thin, C.mT)
        k, m = U.shape
        return torch.addmm(base.view(-1, m), thin.view(-1, k), U, alpha=self.scale).view(base.shape)

    def matrix(self, name, values):
        """The core as `(k, k)` in the plain bases: weighting, band and scale included."""
        C = values[f"{name}.C"]
        C = torch.diag(C) if self.core == "diagonal" else C
        svd = self.bases[name]
        if self.core == "banded":
            at = torch.arange(svd.rank, device=C.device)
            C = C * ((at[:, None] - at).abs() <= self.band)
        weight = self._weight(svd).to(C.device)
        return self.scale * weight[:, None] * C * weight

    def factors(self, name, values):
        """`B = U C` and `A = V^T`: the folded adapter, of the core's rank."""
        svd = self.bases[name]
        C = self.matrix(name, values)
        return svd.U.to(C.device) @ C, svd.V.to(C.device).mT.contiguous()


def hook(form, weights, leaves, groups):
    """The linear hook of `groups` adapters, each on its own share of the batch."""
    adapted = form.layers()

    def linear(name, x):
        base = F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
        if name not in adapted:
            return base
        rows = x.reshape(groups, -1, x.shape[-1])
        out = form.add(name, base.view(groups, -1, base.shape[-1]), rows, leaves)
        return out.view(base.shape)

    return linear


@dataclass(frozen=True)
class Adapter:
    """A trained adapter: factors of its update by layer, and the cores of a LoRA-X one.

    Attributes:
        kind: "lora", "attention" (a LoRA there only) or "lorax".
        factors: name -> (B, A), float32; the update is `B A`.
        cores: name -> `(k, k)` in the bases of the model it was trained on; empty but for "lorax".
        size: trained numbers.
    """

    kind: str
    factors: dict
    cores: dict
    size: int


def trained(form, groups, values):
    """The adapters of every group from `values`: name -> `(groups, ...)`."""
    out = []
    for g in range(groups):
        own = {name: value[g] for name, value in values.items()}
        layers = form.layers()
        factors = {name: form.factors(name, own) for name in layers}
        cores = {} if isinstance(form, Lora) else {n: form.matrix(n, own) for n in layers}
        out.append(Adapter(form.kind, factors, cores, form.size()))
    return out
