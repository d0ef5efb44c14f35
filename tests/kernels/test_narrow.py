# SPDX-License-Identifier: Apache-2.0
"""The references of `cholesky_qr` and `ritz` against float64."""

import narrow_cases as narrow
import op_cases as cases
import pytest


@pytest.mark.parametrize("scale", narrow.SCALES, ids=lambda s: f"scale={s:g}")
@pytest.mark.parametrize("shape", narrow.QR_SHAPES, ids=cases.label)
def test_cholesky_qr(shape, scale):
    narrow.check_cholesky_qr(shape, scale, "reference", "cpu")


@pytest.mark.parametrize("name", sorted(cases.hard_blocks(9, 3)))
def test_cholesky_qr_hard(name):
    narrow.check_cholesky_qr_hard(name, 199, 63, "reference", "cpu")


@pytest.mark.parametrize("scale", narrow.SCALES, ids=lambda s: f"scale={s:g}")
@pytest.mark.parametrize("spectrum", narrow.SPECTRA)
@pytest.mark.parametrize("shape", narrow.RITZ_SHAPES, ids=cases.label)
def test_ritz(shape, spectrum, scale):
    if spectrum == "random" and shape[2] < shape[3]:
        pytest.skip("fewer rows than columns have no full rank")
    narrow.check_ritz(shape, spectrum, scale, "reference", "cpu")


@pytest.mark.parametrize("l", [3, 31, 64], ids=lambda l: f"l={l}")
def test_ritz_status(l):
    narrow.check_ritz_status(l, "reference", "cpu")
