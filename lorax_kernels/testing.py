# SPDX-License-Identifier: Apache-2.0
"""Matrices with known spectra, for tests and benchmarks of this and other packages."""

import math

import torch

SPECTRA = ("power", "flat", "marchenko_pastur", "steep", "low_rank", "clustered")


def singular_values(spectrum: str, n: int, rank: int) -> torch.Tensor:
    """Singular values `(n,)` of a named spectrum, float64, descending.

    Args:
        spectrum: "power" (`i^-0.5`, as attention weights), "flat" (`1 - 0.9 i/n` with eight
            outliers, as MLP weights), "steep" (down to 1e-6 at the end), "low_rank" (zero beyond
            `rank`), "clustered" (16 values around the cut at `rank` within 1 % of each other);
            "marchenko_pastur" is a random matrix's own and comes from `matrix`.
        n: how many.
        rank: where the cut will be.

    Raises:
        ValueError: no such spectrum.
    """
    i = torch.arange(n, dtype=torch.float64)
    if spectrum == "power":
        return (i + 1) ** -0.5
    if spectrum == "flat":
        S = 1 - 0.9 * i / n
        S[:8] = 4 - 0.25 * i[: len(S[:8])]
        return S
    if spectrum == "steep":
        return 10 ** (-6 * i / max(n - 1, 1))
    if spectrum == "low_rank":
        return torch.where(i < rank, 1 / (1 + i / 8), 0.0)
    if spectrum == "clustered":
        S = (i + 1) ** -0.5
        start, stop = max(rank - 8, 0), min(rank + 8, n)
        S[start:stop] = S[start] * torch.linspace(1, 0.99, stop - start, dtype=torch.float64)
        return S.sort(descending=True).values
    raise ValueError(f"spectrum must be one of {', '.join(SPECTRA)}, got {spectrum!r}")


def matrix(
    spectrum: str,
    m: int,
    n: int,
    rank: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """A random `(m, n)` matrix with a named spectrum and random singular vectors.

    "marchenko_pastur" is Gaussian noise plus 32 outliers. The factors are made in float32 on the
    device, so singular values are those of `singular_values` to about 1e-6.

    Example:
        >>> matrix("power", 64, 48, rank=8).shape
        torch.Size([64, 48])
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if spectrum == "marchenko_pastur":
        outliers = min(32, m, n)
        U = torch.linalg.qr(normal(m, outliers)).Q
        V = torch.linalg.qr(normal(n, outliers)).Q
        S = torch.linspace(6, 2, outliers, device=device)
        return ((U * S) @ V.T + normal(m, n) / math.sqrt(max(m, n))).to(dtype)
    p = min(m, n)
    S = singular_values(spectrum, p, rank).to(device=device, dtype=torch.float32)
    U = torch.linalg.qr(normal(m, p)).Q
    V = torch.linalg.qr(normal(n, p)).Q
    return ((U * S) @ V.T).to(dtype)
