# SPDX-License-Identifier: Apache-2.0
"""Outputs appear whole or not at all."""

import errno
import os
from pathlib import Path

import pytest

import lorax_transfer.atomic as atomic
from lorax_transfer.atomic import atomic_directory, atomic_file
from lorax_transfer.errors import OutputError

INTERRUPTIONS = [RuntimeError, KeyboardInterrupt]


def everything_in(path: Path) -> dict[str, str | None]:
    return {
        str(p.relative_to(path)): p.read_text() if p.is_file() else None for p in path.rglob("*")
    }


@pytest.fixture(params=["exchange", "rename"])
def swap(request, monkeypatch):
    """Both ways to replace a directory: in one step, and for systems that cannot."""
    if request.param == "rename":
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    return request.param


def test_directory_appears_only_when_complete(tmp_path):
    target = tmp_path / "new" / "out"
    with atomic_directory(target) as temporary:
        (temporary / "a").write_text("1")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert everything_in(tmp_path) == {"new": None, "new/out": None, "new/out/a": "1"}


def test_directory_gets_the_usual_permissions(tmp_path):
    (tmp_path / "plain").mkdir()
    with atomic_directory(tmp_path / "out"):
        pass
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: e.__name__)
@pytest.mark.parametrize("existing", [False, True], ids=["new", "overwrite"])
def test_interrupted_directory_leaves_nothing(tmp_path, error, existing):
    if existing:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "a").write_text("old")
    before = everything_in(tmp_path)
    target = tmp_path / "out" if existing else tmp_path / "x" / "y" / "out"

    def interrupted():
        with atomic_directory(target, overwrite=True) as temporary:
            (temporary / "a").write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert everything_in(tmp_path) == before


def test_directory_is_replaced_whole(tmp_path, swap):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_directory(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "new").write_text("new")
        assert everything_in(tmp_path / "out") == {"old": "old"}
    assert everything_in(tmp_path) == {"out": None, "out/new": "new"}


@pytest.mark.skipif(not os.path.exists("/proc/version"), reason="needs Linux for renameat2")
def test_exchange_swaps_in_one_step(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
    if not atomic._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip(f"the file system under {tmp_path} cannot exchange two names")
    assert everything_in(tmp_path) == {"a": None, "b": None, "a/b": "b", "b/a": "a"}


def test_failed_replacement_puts_the_old_directory_back(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_text("old")
    monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    rename = os.rename

    def fail_for_the_new_one(source, destination):
        if Path(source).joinpath("b").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    replacing = atomic_directory(tmp_path / "out", overwrite=True)
    with pytest.raises(OutputError, match="No space left"), replacing as temporary:
        (temporary / "b").write_text("new")
    assert everything_in(tmp_path) == {"out": None, "out/a": "old"}


@pytest.mark.parametrize("overwrite", [False, True], ids=["keep", "overwrite"])
@pytest.mark.parametrize("kind", ["file", "link"])
def test_directory_never_replaces_another_thing(tmp_path, kind, overwrite):
    (tmp_path / "real").mkdir()
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("keep")
    else:
        target.symlink_to(tmp_path / "real")
    with pytest.raises(OutputError, match="out"), atomic_directory(target, overwrite=overwrite):
        pytest.fail("the body must not run")
    assert target.is_symlink() == (kind == "link")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "real"]


def test_directory_that_appeared_meanwhile_is_kept(tmp_path):
    target = tmp_path / "out"
    with pytest.raises(OutputError, match="already exists"), atomic_directory(target):
        target.mkdir()
    assert everything_in(tmp_path) == {"out": None}


def test_file_is_replaced_whole(tmp_path):
    target = tmp_path / "new" / "report.json"
    for text in ("1", "2"):
        with atomic_file(target) as temporary:
            temporary.write_text(text)
            assert not target.exists() or target.read_text() == "1"
    assert everything_in(tmp_path) == {"new": None, "new/report.json": "2"}


@pytest.mark.parametrize("error", INTERRUPTIONS, ids=lambda e: e.__name__)
def test_interrupted_file_leaves_the_old_one(tmp_path, error):
    (tmp_path / "report.json").write_text("old")

    def interrupted():
        with atomic_file(tmp_path / "report.json") as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        interrupted()
    assert everything_in(tmp_path) == {"report.json": "old"}


def test_file_onto_a_directory_is_refused(tmp_path):
    with pytest.raises(OutputError, match="is a directory"), atomic_file(tmp_path):
        pytest.fail("the body must not run")


@pytest.mark.parametrize("writer", [atomic_file, atomic_directory], ids=lambda w: w.__name__)
@pytest.mark.parametrize("parent", ["read-only", "file"])
def test_parent_that_cannot_be_written(tmp_path, writer, parent):
    place = tmp_path / "parent"
    if parent == "file":
        place.write_text("")
    else:
        place.mkdir()
        place.chmod(0o500)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    with pytest.raises(OutputError, match="cannot write"), writer(place / "out") as temporary:
        temporary.write_text("x")


def test_read_only_file_system_is_one_sentence(tmp_path, monkeypatch):
    # Permissions do not bind every user, so the system's answer is given in its place.
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with (
        pytest.raises(OutputError, match=r"cannot write .*out: Read-only file system; choose"),
        atomic_directory(tmp_path / "out"),
    ):
        pytest.fail("the body must not run")
