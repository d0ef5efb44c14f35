# SPDX-License-Identifier: Apache-2.0
"""LoRA-X between devices: what a GPU trained is found again on a CPU, and the other way round."""

import copy

import pytest
import torch

import lorax_kernels as lk
from lorax_kernels import testing
from lorax_transfer.adapters import lorax_form
from lorax_transfer.bases import BasisMaker

pytestmark = pytest.mark.gpu


def exact(W: torch.Tensor, rank: int) -> lk.SVD:
    return BasisMaker(lorax_form.TOLERANCE, is_exact=True).make([W], [rank])[0].svd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(576, 576), (1536, 576), (192, 576)], ids=str)
def test_vectors_are_those_of_the_cpu(shape: tuple[int, int], dtype: torch.dtype) -> None:
    W = testing.matrix("flat", *shape, 64).to(dtype)
    there, here = exact(W.cuda(), 64), exact(W, 64)
    _, deviation = lorax_form.signs(lorax_form.probe(here.U), lorax_form.probe(there.U).cpu())
    # float64's rounding over gaps of 1e-4 gives 1e-11; float32 results add 1e-7.
    assert deviation < 1e-5
    torch.testing.assert_close(there.S.cpu(), here.S, rtol=1e-5, atol=0)


def test_trained_on_a_gpu_and_loaded_on_a_cpu(tmp_path) -> None:
    pytest.importorskip("peft")
    from lorax_transfer.peft import add_lorax_adapter, load_lorax_adapter, lorax_layers

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(96, 160), torch.nn.ReLU(), torch.nn.Linear(160, 10))
    model = add_lorax_adapter(copy.deepcopy(base).cuda(), 16, target_modules=["0", "2"])
    x, labels = torch.randn(64, 96), torch.arange(64) % 10
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(x.cuda()), labels.cuda())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    model.save_pretrained(tmp_path)
    loaded = load_lorax_adapter(base, tmp_path)
    for name, layer in lorax_layers(model).items():
        there = layer.get_delta_weight("default").detach().cpu()
        here = lorax_layers(loaded)[name].get_delta_weight("default").detach()
        assert (here - there).norm() < 1e-5 * there.norm()
    with torch.autocast("cuda", torch.bfloat16):
        assert model(x.cuda()).dtype == torch.bfloat16
    torch.testing.assert_close(loaded(x), model(x.cuda()).cpu(), rtol=1e-4, atol=1e-4)
