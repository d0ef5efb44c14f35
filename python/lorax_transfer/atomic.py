# SPDX-License-Identifier: Apache-2.0
"""Outputs that appear whole or not at all: written beside their place, then renamed into it."""

import ctypes
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lorax_transfer.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file that replaces what was there only when it is complete.

    Args:
        path: where the file is to appear; missing parent directories are made.

    Yields:
        Path of a temporary sibling to write to.

    Raises:
        OutputError: if the place cannot be written, or the body wrote nothing.

    Example:
        >>> with atomic_file("report.json") as temporary:  # doctest: +SKIP
        ...     temporary.write_text("{}")
    """
    target = Path(path)
    if target.is_dir():
        raise OutputError(f"{target} is a directory, expected the path of a file to write.")
    with _parents_of(target):
        temporary = _sibling(target)
        try:
            yield temporary
            try:
                os.replace(temporary, target)
            except OSError as error:
                raise _cannot_write(target, error) from error
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], overwrite: bool = False) -> Iterator[Path]:
    """Fill a directory that appears only when it is complete.

    An existing directory is exchanged in one step where the system offers that (Linux). Elsewhere
    it is renamed aside first and renamed back if the new one cannot take its place.

    Args:
        path: where the directory is to appear; missing parent directories are made.
        overwrite: replace an existing directory, everything in it included.

    Yields:
        Path of an empty temporary sibling directory to fill.

    Raises:
        OutputError: if path exists and overwrite is False, is no directory, or cannot be written.

    Example:
        >>> with atomic_directory("adapter") as temporary:  # doctest: +SKIP
        ...     (temporary / "README.md").write_text("# A card")
    """
    target = Path(path)
    _check_place(target, overwrite)
    with _parents_of(target):
        temporary = _sibling(target)
        try:
            try:
                temporary.mkdir()
            except OSError as error:
                raise _cannot_write(target, error) from error
            yield temporary
            try:
                _install(temporary, target, overwrite)
            except OSError as error:
                raise _cannot_write(target, error) from error
        finally:
            # After an exchange this is the old version.
            shutil.rmtree(temporary, ignore_errors=True)


def _check_place(target: Path, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise OutputError(
            f"{target} already exists; choose another output or ask to overwrite it (--overwrite)."
        )
    if target.is_symlink() or not target.is_dir():
        raise OutputError(
            f"{target} exists and is not a plain directory, so it is not overwritten; remove it "
            "or choose another output."
        )


def _install(temporary: Path, target: Path, overwrite: bool) -> None:
    # Checked again: the body may have taken minutes, and rename replaces an empty directory.
    _check_place(target, overwrite)
    if not target.exists():
        os.rename(temporary, target)
        return
    if _exchange(temporary, target):
        return
    aside = _sibling(target)
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except BaseException:
        os.rename(aside, target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two paths in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError, TypeError):
        return False
    return (
        renameat2(
            _AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), ctypes.c_uint(_RENAME_EXCHANGE)
        )
        == 0
    )


def _sibling(target: Path) -> Path:
    return target.absolute().with_name(f".{target.absolute().name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def _parents_of(target: Path) -> Iterator[None]:
    """Make the missing parent directories, and take them away again if the body fails."""
    missing = []
    for parent in target.absolute().parents:
        if parent.exists():
            break
        missing.append(parent)
    try:
        try:
            target.absolute().parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _cannot_write(target, error) from error
        yield
    except BaseException:
        for parent in missing:
            try:
                parent.rmdir()
            except OSError:
                break
        raise


def _cannot_write(target: Path, error: OSError) -> OutputError:
    reason = error.strerror or str(error)
    return OutputError(
        f"cannot write {target}: {reason}; choose a place that can be written (--output)."
    )
