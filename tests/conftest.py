# SPDX-License-Identifier: Apache-2.0
"""What every test runs under: fixed seeds, poisoned memory, full float32 products."""

import sys
from collections.abc import Callable, Iterator

import pytest
import torch

_SEED = 42
# What peft says of adapters that tests make on purpose.
_PEFT = (
    # It asks transformers 5 for an attribute that is on its way out.
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    # One flag for all modules, which may be of several kinds.
    "ignore:fan_in_fan_out is set to (True|False):UserWarning",
    # A table that is adapted is also copied whole.
    "ignore:Setting `save_embedding_layers` to `True`:UserWarning",
    "ignore:Model (has|with) `tie_word_embeddings=True`:UserWarning",
    "ignore:You have requested `ensure_weight_tying`:UserWarning",
)
_PACKAGE = "lorax_kernels"


# Test matrices are small: a second thread gains nothing on them, and costs much on a busy machine.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    for line in _PEFT:
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and PyTorch sees none here")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _fixed_conditions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Seeds every generator and turns TF32 off; a backend set in the environment is ignored."""
    monkeypatch.delenv("LORAX_KERNELS_BACKEND", raising=False)
    torch.manual_seed(_SEED)
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    yield
    matmul.allow_tf32 = before


def _poisoned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
        made = make(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == _PACKAGE and made.is_floating_point() and not _is_fake(made):
            made.fill_(float("nan"))
        return made

    return poisoned


def _is_fake(made: torch.Tensor) -> bool:
    return isinstance(made, torch._subclasses.FakeTensor) or made.is_meta


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills what the package allocates with NaN, so that an element nobody writes shows."""
    monkeypatch.setattr(torch, "empty", _poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", _poisoned(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoned(torch.Tensor.new_empty))
