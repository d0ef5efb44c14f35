# SPDX-License-Identifier: Apache-2.0
"""The switch: which functions of which tools are replaced, by whom, and how they come back.

A replaced attribute holds a wrapper that asks the switch at every call: on, it runs this package's
version; off, the original. So a reference that somebody took while the switch was on is harmless,
and so is a third party that patches the same attribute on top.
"""

import functools
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import TracebackType
from typing import Any

from .. import _backends
from . import _imports

_log = logging.getLogger("lorax_kernels")
_lock = threading.RLock()
_MISSING = object()


@dataclass(frozen=True)
class Options:
    """How a replacement computes.

    Attributes:
        tol: relative projector error of every truncated SVD.
        backend: backend of the kernels.
    """

    tol: float
    backend: str


# Called as replacement(options, original, *args, **kwargs).
Replacement = Callable[..., Any]


@dataclass(frozen=True)
class Door:
    """One function of another tool that can be replaced.

    Attributes:
        tool: name of the package that it belongs to.
        versions: its versions that are known, all others being refused.
        target: dotted path, module and attribute joined by a colon.
        does: what changes.
        is_open: whether the replacement is in place now.
    """

    tool: str
    versions: tuple[str, ...]
    target: str
    does: str
    is_open: bool


class Patch:
    """One attribute and its replacement; installed while any handle wants it."""

    def __init__(
        self, target: str, does: str, replacement: Replacement, tool: str | None = None
    ) -> None:
        """Names the attribute as "module:Class.attribute"; `tool` if not the module's package."""
        self.target, self.does, self.replacement = target, does, replacement
        self.module, _, self.path = target.partition(":")
        self.tool = tool or self.module.partition(".")[0]
        self._before: object = _MISSING
        self._wrapper: Callable[..., Any] | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the attribute holds the wrapper."""
        return self._wrapper is not None

    def install(self) -> None:
        """Replace the attribute."""
        owner, name = self._owner()
        original = getattr(owner, name)
        # An inherited attribute has to go away again, not become the class's own.
        self._before = vars(owner).get(name, _MISSING)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            options = active(self.tool)
            if options is None:
                return original(*args, **kwargs)
            return self.replacement(options, original, *args, **kwargs)

        self._wrapper = wrapper
        setattr(owner, name, wrapper)

    def remove(self) -> None:
        """Put the attribute back as it was."""
        if self._wrapper is None:
            return
        owner, name = self._owner()
        if vars(owner).get(name) is not self._wrapper:
            _log.warning(
                "%s was replaced by other code while compat was on, and is left to it; what it "
                "wraps is the original again",
                self.target,
            )
        elif self._before is _MISSING:
            delattr(owner, name)
        else:
            setattr(owner, name, self._before)
        self._wrapper, self._before = None, _MISSING

    def _owner(self) -> tuple[Any, str]:
        owner: Any = sys.modules[self.module]
        *parents, name = self.path.split(".")
        for parent in parents:
            owner = getattr(owner, parent)
        return owner, name


@dataclass(frozen=True)
class Tool:
    """A package with doors."""

    name: str
    versions: tuple[str, ...]
    patches: tuple[Patch, ...]

    def check(self) -> None:
        """Raise RuntimeError unless the installed version is a known one."""
        found = self.installed()
        if found is None:
            raise RuntimeError(f"{self.name} is not installed, so there is nothing to replace")
        if found not in self.versions:
            raise RuntimeError(
                f"{self.name} {found} is not known to lorax_kernels.compat, which was checked "
                f"against {', '.join(self.versions)}; install one of these, or leave {self.name} "
                "out"
            )

    def installed(self) -> str | None:
        """The installed version, or None."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return None


class Handle:
    """What `enable` returns: undo it with `disable`, or use it as a context manager."""

    def __init__(self, tools: tuple[Tool, ...], options: Options) -> None:
        """Takes effect at once."""
        self._tools, self.options = tools, options
        self._names = frozenset(tool.name for tool in tools)
        with _lock:
            _handles.append(self)
            for tool in tools:
                for patch in tool.patches:
                    _want(patch)

    @property
    def is_on(self) -> bool:
        """Whether it has not been disabled."""
        return self in _handles

    def applies_to(self, tool: str) -> bool:
        """Whether it is for this tool."""
        return tool in self._names

    def disable(self) -> None:
        """Undo this one call of `enable`; nothing if that was done."""
        with _lock:
            if self not in _handles:
                return
            _handles.remove(self)
            for tool in self._tools:
                if active(tool.name) is None:
                    for patch in tool.patches:
                        _imports.forget(patch.module, patch.install)
                        patch.remove()

    def __enter__(self) -> "Handle":
        """The handle itself; it is on already."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Disable it."""
        self.disable()


_handles: list[Handle] = []


def _want(patch: Patch) -> None:
    if not patch.is_installed:
        _imports.forget(patch.module, patch.install)
        _imports.when_imported(patch.module, patch.install)


def active(tool: str) -> Options | None:
    """Options of the latest handle for a tool that is on, or None."""
    for handle in reversed(_handles):
        if handle.applies_to(tool):
            return handle.options
    return None


@functools.cache
def _tools() -> dict[str, Tool]:
    from . import _mergekit, _peft

    return {tool.name: tool for tool in (_peft.TOOL, _mergekit.TOOL)}


def enable(*tools: str, tol: float = 1e-3, backend: str = "auto") -> Handle:
    """Put this package behind the SVDs of other tools.

    In effect from the call on, for modules that are imported already and for those that come later
    (nothing is imported here), for the whole process. Calls may be nested: the latest one's
    options count, and a tool's functions are restored when its last handle is disabled.

    Args:
        *tools: "peft", "mergekit"; none for all that are installed.
        tol: relative projector error of the truncated SVDs, as in `truncated_svd`.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        A handle; as a context manager it disables itself at the end of the block.

    Raises:
        ValueError: an unknown tool or backend, or tol not positive.
        RuntimeError: a tool is not installed, or in a version that is not known.

    Example:
        >>> with enable("peft"):  # doctest: +SKIP
        ...     model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "ab", combination_type="svd")
    """
    known = _tools()
    unknown = [name for name in tools if name not in known]
    if unknown:
        raise ValueError(f"there are doors for {', '.join(known)}, not for {unknown[0]!r}")
    if not tol > 0:
        raise ValueError(f"tol must be positive, got {tol}")
    _backends.check_name(backend)
    chosen = tuple(
        dict.fromkeys(known[name] for name in tools)
        or [tool for tool in known.values() if tool.installed() is not None]
    )
    if not chosen:
        raise RuntimeError(f"none of {', '.join(known)} is installed, so nothing can be replaced")
    for tool in chosen:
        tool.check()
    return Handle(chosen, Options(tol, backend))


def disable() -> None:
    """Undo every `enable` that is still on.

    Example:
        >>> disable()
    """
    with _lock:
        for handle in list(reversed(_handles)):
            handle.disable()


def doors() -> list[Door]:
    """The functions that can be replaced, and whether they are now.

    Example:
        >>> doors()[0].tool
        'peft'
    """
    return [
        Door(tool.name, tool.versions, patch.target, patch.does, patch.is_installed)
        for tool in _tools().values()
        for patch in tool.patches
    ]
