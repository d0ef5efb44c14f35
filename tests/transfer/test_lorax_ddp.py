# SPDX-License-Identifier: Apache-2.0
"""A LoRA-X adapter trained by two processes: the same cores in both, those of one with all data."""

import multiprocessing
from pathlib import Path

import adapter_makers
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lorax_transfer.peft import add_lorax_adapter, lorax_layers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.skipif(not dist.is_gloo_available(), reason="needs PyTorch's gloo backend"),
]

_WORLD = 2
_STEPS = 3


def _tokens() -> torch.Tensor:
    return torch.randint(0, 64, (2 * _WORLD, 8), generator=torch.Generator().manual_seed(5))


def _train(rank: int | None, root: Path) -> None:
    model = add_lorax_adapter(adapter_makers.llama(), 4)
    tokens, wrapped = _tokens(), model
    if rank is not None:
        torch.set_num_threads(1)
        store = f"file://{root / 'store'}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=_WORLD)
        wrapped, tokens = DistributedDataParallel(model), tokens[rank::_WORLD]
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=1.0)
    for _ in range(_STEPS):
        optimizer.zero_grad()
        wrapped(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    cores = {name: x.core_of("default").weight.detach() for name, x in lorax_layers(model).items()}
    torch.save(cores, root / f"{rank}.pt")
    if rank is not None:
        dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    # Forked, since to import everything again would take longer than the test.
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_train, args=(rank, tmp_path)) for rank in range(_WORLD)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
        assert worker.exitcode == 0
    _train(None, tmp_path)
    one, two, alone = (
        torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0", "1", "None")
    )
    assert any(core.abs().max() > 1e-3 for core in alone.values())
    for name, core in alone.items():
        assert torch.equal(one[name], two[name])
        # Means of means: another order of summation.
        torch.testing.assert_close(one[name], core, rtol=1e-4, atol=1e-6)
