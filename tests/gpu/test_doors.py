# SPDX-License-Identifier: Apache-2.0
"""svd_lowrank, svd_diff and the doors into PEFT on a GPU."""

import copy
import functools

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import compat, testing

pytestmark = pytest.mark.gpu


def captured(A, V):
    return float(torch.linalg.vector_norm(A.double() @ V.double()) ** 2)


@functools.cache
def case(spectrum, shape, q):
    A = testing.matrix(spectrum, *shape, q, device="cuda")
    return A, float((torch.linalg.svdvals(A.double())[:q] ** 2).sum())


@pytest.mark.parametrize("niter", [0, 2, 4], ids=lambda x: f"niter{x}")
@pytest.mark.parametrize("q", [1, 6, 64], ids=lambda x: f"q{x}")
@pytest.mark.parametrize("shape", [(1025, 768), (700, 1900)], ids=["tall", "wide"])
@pytest.mark.parametrize("spectrum", testing.SPECTRA)
def test_svd_lowrank_is_never_less_accurate(spectrum, shape, q, niter):
    A, head = case(spectrum, shape, q)
    torch.manual_seed(0)
    theirs = torch.svd_lowrank(A, q, niter)
    ours = lk.svd_lowrank(A, q, niter)
    for side, matrix in ((2, A), (0, A.T)):
        missed = [1 - captured(matrix, x[side]) / head for x in (ours, theirs)]
        # 2e-6: sixteen float32 roundings, where both have converged; 2 %: torch's start is random.
        assert missed[0] <= 1.02 * missed[1] + 2e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_svd_diff(dtype):
    W0 = testing.matrix("power", 512, 384, 16, device="cuda")
    W1 = (W0 + 0.01 * testing.matrix("power", 512, 384, 16, device="cuda")).to(dtype)
    W0 = W0.to(dtype)
    svd = lk.svd_diff([W1], [W0], 16)[0]
    S = torch.linalg.svdvals(W1.double() - W0.double())[:16]
    torch.testing.assert_close(svd.S.double(), S, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_pissa_and_add_weighted_adapter(dtype):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(512, 640), torch.nn.Linear(640, 512))
    net = net.to("cuda", dtype)
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["0", "1"]}

    def build():
        chosen = peft.LoraConfig(init_lora_weights="pissa", **config)
        return peft.get_peft_model(copy.deepcopy(net), chosen, "first")

    exact = build()
    with compat.enable("peft"):
        ours = build()
    for name in ("0", "1"):
        layers = [x.get_submodule(f"base_model.model.{name}") for x in (exact, ours)]
        wanted, found = (x.get_delta_weight("first").float() for x in layers)
        # The tolerance of the truncated SVD, and PEFT's rounding of the factors.
        limit = 2e-3 + 4 * torch.finfo(dtype).eps
        assert torch.linalg.norm(found - wanted) <= limit * torch.linalg.norm(wanted)
    ours.add_adapter("second", peft.LoraConfig(init_lora_weights=False, **config))
    sums = []
    for is_on in (False, True):
        options = {"combination_type": "svd", "svd_rank": 12}
        with compat.enable("peft") if is_on else torch.no_grad():
            ours.add_weighted_adapter(["first", "second"], [0.5, 2.0], "sum", **options)
        layer = ours.get_submodule("base_model.model.0")
        sums.append(layer.get_delta_weight("sum").float())
        ours.delete_adapter("sum")
    # Float32 against float32: torch's dense SVD has the larger error.
    assert torch.linalg.norm(sums[1] - sums[0]) <= 1e-5 * torch.linalg.norm(sums[0])
