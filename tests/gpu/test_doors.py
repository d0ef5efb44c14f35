# SPDX-License-Identifier: Apache-2.0
"""svd_lowrank, svd_diff and the doors into PEFT on a GPU."""

import copy
import functools

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import compat, testing

# PyTorch's fast SVD on a GPU may fail to converge, says so, and takes another.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:torch.linalg.svd:UserWarning")]


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
        # Less than nothing is missed where columns are not orthonormal; that is no accuracy.
        missed = [max(0.0, 1 - captured(matrix, x[side]) / head) for x in (ours, theirs)]
        V = ours[side].double()
        span = 1 - captured(matrix, torch.linalg.qr(V).Q) / head
        turned = float((V.T @ V - torch.eye(q, device="cuda")).abs().max())
        # 2e-6: sixteen float32 roundings, where both have converged; 2 %: torch's start is random.
        assert missed[0] <= 1.02 * missed[1] + 2e-6, (
            f"its span misses {span:.1e}, V^T V is {turned:.1e} off"
        )


@pytest.mark.parametrize("shape", [(8192, 8192), (16384, 4096)], ids=["square", "tall"])
@pytest.mark.parametrize("spectrum", ["power", "marchenko_pastur", "steep"])
def test_svd_lowrank_of_a_large_matrix(spectrum, shape):
    """Where all products but the last three read it in bfloat16."""
    A = testing.matrix(spectrum, *shape, 64, device="cuda")
    torch.manual_seed(0)
    for niter in (2, 4):
        theirs, ours = torch.svd_lowrank(A, 24, niter), lk.svd_lowrank(A, 24, niter)
        for side, matrix in ((2, A), (0, A.T)):
            # 2e-6: sixteen float32 roundings, where both have converged.
            assert captured(matrix, ours[side]) >= captured(matrix, theirs[side]) * (1 - 2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_svd_lowrank_of_a_stack_with_dependent_columns(dtype):
    A = torch.zeros(3, 700, 520, device="cuda", dtype=dtype)
    A[0, 3, 5] = 3
    A[2, :40, :40] = torch.diag(1 / torch.arange(1.0, 41)).to(A)
    U, S, V = lk.svd_lowrank(A, 20)
    for X in (U, V):
        eye = torch.eye(20, device="cuda", dtype=torch.float64).expand(3, -1, -1)
        torch.testing.assert_close(X.double().mT @ X.double(), eye, rtol=0, atol=2e-6)
    exact = torch.linalg.svdvals(A.double())[:, :20].float()
    # The block holds all forty directions; 1e-5: two 16-bit pieces of it on tensor cores.
    torch.testing.assert_close(S, exact, rtol=0, atol=1e-5)
    torch.testing.assert_close((U.mT @ A.float() @ V).diagonal(0, 1, 2), S, rtol=0, atol=1e-5)


def test_svd_lowrank_refuses_what_is_not_finite():
    A = torch.ones(64, 48, device="cuda")
    A[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN or Inf"):
        lk.svd_lowrank(A)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_svd_diff(dtype):
    W0 = testing.matrix("power", 512, 384, 16, device="cuda")
    W1 = (W0 + 0.01 * testing.matrix("power", 512, 384, 16, device="cuda")).to(dtype)
    W0 = W0.to(dtype)
    svd = lk.svd_diff([W1], [W0], 16)[0]
    S = torch.linalg.svdvals(W1.double() - W0.double())[:16]
    torch.testing.assert_close(svd.S.double(), S, rtol=1e-4, atol=0)


def principal(W, rank):
    """The best approximation of a rank, in float64."""
    U, S, Vh = torch.linalg.svd(W.detach().double(), full_matrices=False)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def off(found, exact):
    return float(torch.linalg.norm(found.double() - exact) / torch.linalg.norm(exact))


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=str)
def net(request):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    layers = (torch.nn.Linear(512, 640), torch.nn.Linear(640, 512), torch.nn.Linear(512, 640))
    return torch.nn.Sequential(*layers).to("cuda", request.param)


def adapted(net, name="first", **more):
    import peft

    config = {"r": 8, "lora_alpha": 8, "target_modules": ["0", "1", "2"], **more}
    return peft.get_peft_model(copy.deepcopy(net), peft.LoraConfig(**config), name)


def layer_of(model, name):
    return model.get_submodule(f"base_model.model.{name}")


@pytest.mark.parametrize(("init", "tol"), [("pissa", 1e-3), ("pissa_niter_16", 1e-2)])
def test_pissa(net, init, tol):
    """Judged by float64, as is PEFT's own full SVD, whose float32 on a GPU is not always better."""
    theirs = adapted(net, init_lora_weights="pissa")
    with compat.enable("peft"):
        ours = adapted(net, init_lora_weights=init)
    for name in ("0", "1", "2"):
        W = net.get_submodule(name).weight
        exact = principal(W, 8)
        one, other = (layer_of(x, name) for x in (ours, theirs))
        found, plain = (off(x.get_delta_weight("first").detach(), exact) for x in (one, other))
        # Both sides are off by the tolerance at most, and PEFT rounds the factors to W's dtype.
        limit = 1.5 * tol + 2 * torch.finfo(W.dtype).eps
        assert found <= max(limit, 2 * plain), f"PEFT's own is off by {plain:.1e}"
        whole = one.base_layer.weight.float() + one.get_delta_weight("first").float()
        assert off(whole.detach(), W.detach().double()) <= 1e-6 + 2 * torch.finfo(W.dtype).eps


def test_add_weighted_adapter(net):
    import peft

    model = adapted(net, init_lora_weights=False)
    config = {"r": 8, "lora_alpha": 8, "target_modules": ["0", "1", "2"]}
    model.add_adapter("second", peft.LoraConfig(init_lora_weights=False, **config))
    parts = [layer_of(model, "0").get_delta_weight(x).detach() for x in ("first", "second")]
    exact = principal(0.5 * parts[0].double() + 2.0 * parts[1].double(), 12)
    errors = []
    for is_on in (False, True):
        options = {"combination_type": "svd", "svd_rank": 12}
        with compat.enable("peft") if is_on else torch.no_grad():
            model.add_weighted_adapter(["first", "second"], [0.5, 2.0], "sum", **options)
        errors.append(off(layer_of(model, "0").get_delta_weight("sum").detach(), exact))
        model.delete_adapter("sum")
    plain, found = errors
    # Float32 factors of an exact product, 1e-5, or no worse than torch's dense SVD of it.
    assert found <= max(1e-5, plain), f"PEFT's own is off by {plain:.1e}"
