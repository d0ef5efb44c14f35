# SPDX-License-Identifier: Apache-2.0
"""Which code runs an op: a table that can be asked, and the one function that chooses.

The order is `cuda` (compiled kernels), `triton`, `reference` (plain PyTorch). `auto` takes the
first that can run and says once, at level INFO, why it passed over a faster one; a backend asked
for by name that cannot run raises.
"""

import functools
import importlib.util
import logging
import operator
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import _extension, _ops

ORDER = ("cuda", "triton", "reference")
ENVIRONMENT = "LORAX_KERNELS_BACKEND"
_log = logging.getLogger("lorax_kernels")


@dataclass(frozen=True)
class Kernel:
    """One op on one backend.

    Attributes:
        run: takes the op's positional arguments.
        accepts: one line for people: dtypes, sizes, architectures.
        refuses: given the same arguments, the reason why they cannot be taken, or None.
    """

    run: Callable[..., Any]
    accepts: str
    refuses: Callable[..., str | None] = lambda *_: None


@dataclass(frozen=True)
class Backend:
    """A row of the backend table.

    Attributes:
        name: "cuda", "triton" or "reference".
        available: whether it can run anything on this machine.
        reason: what makes it available, or what is missing.
        ops: for each op it has, what it accepts.
    """

    name: str
    available: bool
    reason: str
    ops: dict[str, str]


_is_cuda = operator.attrgetter("is_cuda")
_KERNELS: dict[str, dict[str, Kernel]] = {name: {} for name in ORDER}


def register(backend: str, op: str, kernel: Kernel) -> None:
    """Adds an op to a backend's row of the table."""
    _KERNELS[backend][op] = kernel


def register_reference(op: str, reference: Callable[..., Any]) -> None:
    """Makes a plain PyTorch function the op's answer on every device without a kernel."""
    torch.library.register_kernel(f"{_ops.NAMESPACE}::{op}", None, reference)
    # Through the dispatcher on the CPU, so that the op stays one node of a compiled graph; as a
    # plain function on a GPU, where the dispatcher would find the compiled kernel instead.
    dispatched = getattr(getattr(torch.ops, _ops.NAMESPACE), op)

    def run(*arguments: Any) -> Any:
        first = next(_tensors(arguments), None)
        on_gpu = first is not None and first.is_cuda
        return reference(*arguments) if on_gpu else dispatched(*arguments)

    register("reference", op, Kernel(run, "any device and dtype the op takes"))


def _tensors(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from _tensors(argument)


@functools.cache
def _availability(name: str) -> tuple[bool, str]:
    if name == "reference":
        return True, f"PyTorch {torch.__version__}"
    if name == "cuda":
        extension = _extension.load()
        if not extension.loaded:
            return False, f"the extension was {extension.reason}"
        if extension.cuda_version is None:
            return False, f"the extension was {extension.reason}"
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return False, "the package triton is not installed"
        if os.environ.get("TRITON_INTERPRET") == "1":
            return True, "Triton's interpreter (TRITON_INTERPRET=1): for tests, slow"
    if not torch.cuda.is_available():
        return False, "no CUDA device is visible to PyTorch"
    major, minor = torch.cuda.get_device_capability()
    if (major, minor) < (8, 0):
        return False, f"needs compute capability 8.0 or newer, this device has {major}.{minor}"
    return True, f"{torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def backends() -> list[Backend]:
    """The backend table of this machine, fastest first.

    Returns:
        One row for each of "cuda", "triton" and "reference": whether it is available, why or why
        not, and what each of its ops accepts.

    Example:
        >>> backends()[-1].name
        'reference'
    """
    rows = []
    for name in ORDER:
        available, reason = _availability(name)
        accepts = {op: kernel.accepts for op, kernel in sorted(_KERNELS[name].items())}
        rows.append(Backend(name, available, reason, accepts))
    return rows


def check_name(backend: str) -> None:
    """Raises ValueError unless this is "auto" or the name of a backend."""
    if backend not in ("auto", *ORDER):
        raise ValueError(f"backend must be one of auto, {', '.join(ORDER)}; got {backend!r}")


def requested(backend: str) -> str:
    """The backend asked for: the argument, or for "auto" the environment variable's, if set."""
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT) or "auto"
    check_name(backend)
    return backend


def _why_not(name: str, op: str, arguments: Sequence[Any]) -> str | None:
    available, reason = _availability(name)
    if not available:
        return reason
    kernel = _KERNELS[name].get(op)
    if kernel is None:
        return f"it has no kernel for {op}"
    interpreted = name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    if name != "reference" and not interpreted:
        # Lists are of whole models: no Python for each of their tensors.
        lists = [x for x in arguments if isinstance(x, (list, tuple))]
        others = [x for x in arguments if isinstance(x, torch.Tensor)]
        if not all(all(map(_is_cuda, tensors)) for tensors in (*lists, others)):
            elsewhere = next(t.device for t in _tensors(arguments) if not t.is_cuda)
            return f"it runs on CUDA tensors, got one on {elsewhere}"
    return kernel.refuses(*arguments)


@functools.cache
def _say_once(message: str) -> None:
    _log.info(message)


def select(op: str, backend: str, *arguments: Any) -> Callable[..., Any]:
    """The code that will run `op` on these arguments.

    Args:
        op: name of an op of the contract.
        backend: "auto" or a backend's name. "auto" defers to the environment variable
            `LORAX_KERNELS_BACKEND` when that is set.
        *arguments: the op's positional arguments.

    Returns:
        A callable that takes the same arguments.

    Raises:
        ValueError: no such backend.
        RuntimeError: the backend was asked for by name and cannot run here.
    """
    backend = requested(backend)
    if backend != "auto":
        reason = _why_not(backend, op, arguments)
        if reason is not None:
            raise RuntimeError(f"backend {backend!r} cannot run {op}: {reason}")
        return _KERNELS[backend][op].run
    on_gpu = any(t.is_cuda for t in _tensors(arguments))
    for name in ORDER[:-1] if on_gpu else ():
        reason = _why_not(name, op, arguments)
        if reason is None:
            return _KERNELS[name][op].run
        _say_once(f"{op}: not on backend {name!r}: {reason}")
    return _KERNELS["reference"][op].run
