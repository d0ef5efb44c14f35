# SPDX-License-Identifier: Apache-2.0
"""`project` on any machine: the reference against float64."""

import pytest
import torch
from project_cases import DTYPES, SHAPES, errors, make_layers

from lorax_kernels.ops import project


@pytest.mark.parametrize("factor", DTYPES)
@pytest.mark.parametrize(("read", "write"), [("bf16", "fp32"), ("fp32", "fp64"), ("fp64", "fp64")])
def test_reference(factor, read, write):
    """A float64 block is worth float64 sums, whatever its bases."""
    generator = torch.Generator().manual_seed(3)
    layers = make_layers(SHAPES, DTYPES[factor], DTYPES[read], DTYPES[write], generator)
    results = project(*layers)
    for (found, limit), X, B in zip(errors(results, layers), results, layers[0], strict=True):
        assert found <= limit
        assert X.dtype == B.dtype
