# SPDX-License-Identifier: Apache-2.0
"""The switch itself: what it patches, when, and that every attribute comes back."""

import importlib
import logging
import subprocess
import sys
from importlib.metadata import EntryPoint, version

import peft
import pytest
import torch
from compat_models import Net

from lorax_kernels import compat
from lorax_kernels.compat import __main__ as runner
from lorax_kernels.compat import _imports, _switch
from lorax_kernels.compat.__main__ import main

TARGETS = [door.target for door in compat.doors() if door.tool == "peft"]


def snapshot():
    """Every attribute of every class and module of PEFT's LoRA, by identity."""
    found = {}
    for target in TARGETS:
        module = importlib.import_module(target.partition(":")[0])
        for name, value in vars(module).items():
            found[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__ == module.__name__:
                found.update(
                    {(module.__name__, name, key): id(x) for key, x in vars(value).items()}
                )
    return found


@pytest.fixture(autouse=True)
def _off():
    before = snapshot()
    yield
    compat.disable()
    assert snapshot() == before


def changed(before):
    after = snapshot()
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_patches_only_what_it_names():
    before = snapshot()
    with compat.enable("peft"):
        names = {(t.partition(":")[0], *t.partition(":")[2].split(".")) for t in TARGETS}
        assert changed(before) == names
        assert all(door.is_open for door in compat.doors() if door.tool == "peft")
    assert changed(before) == set()
    assert not any(door.is_open for door in compat.doors())


def test_restores_after_an_exception():
    before = snapshot()
    with pytest.raises(ZeroDivisionError), compat.enable("peft"):
        1 / 0  # noqa: B018
    assert changed(before) == set()


def test_restores_after_an_exception_inside_a_patched_call():
    before = snapshot()
    config = peft.LoraConfig(r=2, target_modules=["fc1"], init_lora_weights="pissa")
    net = Net()
    net.fc1.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"), compat.enable("peft"):
        peft.get_peft_model(net, config)
    assert changed(before) == set()
    fresh = peft.get_peft_model(Net(), config)
    assert bool(fresh.base_model.model.fc1.lora_A["default"].weight.isfinite().all())


def test_nested_handles_keep_it_on_until_the_last():
    before = snapshot()
    outer = compat.enable("peft", tol=1e-2)
    with compat.enable("peft", tol=1e-4):
        assert _switch.active("peft").tol == 1e-4
    assert _switch.active("peft").tol == 1e-2
    assert changed(before) != set()
    assert outer.is_on
    outer.disable()
    outer.disable()
    assert not outer.is_on
    assert changed(before) == set()


def test_handles_may_end_in_any_order():
    before = snapshot()
    first, second = compat.enable("peft", tol=1e-2), compat.enable("peft", tol=1e-4)
    first.disable()
    assert _switch.active("peft").tol == 1e-4
    assert changed(before) != set()
    second.disable()
    assert changed(before) == set()


def test_permanent_until_disabled():
    before = snapshot()
    compat.enable("peft")
    compat.enable("peft")
    assert changed(before) != set()
    compat.disable()
    assert changed(before) == set()


def test_a_reference_taken_while_on_is_the_original_again_afterwards():
    from peft.utils import loftq_utils

    with compat.enable("peft"):
        kept = loftq_utils._low_rank_decomposition
        assert kept(torch.randn(8, 6), 2)["U"].shape == (8, 2)
    assert kept(torch.randn(8, 6), 2)["U"].shape == (8, 6)


def test_leaves_a_patch_that_others_put_on_top(monkeypatch, caplog):
    from peft.utils import loftq_utils

    original = loftq_utils._low_rank_decomposition
    handle = compat.enable("peft")
    ours = loftq_utils._low_rank_decomposition
    monkeypatch.setattr(loftq_utils, "_low_rank_decomposition", lambda *a, **k: ours(*a, **k))
    with caplog.at_level(logging.WARNING, "lorax_kernels"):
        handle.disable()
    assert "replaced by other code" in caplog.text
    assert loftq_utils._low_rank_decomposition(torch.randn(8, 6), 2)["U"].shape == (8, 6)
    loftq_utils._low_rank_decomposition = original


def test_refuses_an_unknown_version_by_name(monkeypatch):
    monkeypatch.setattr(
        _switch, "version", lambda name: "99.1" if name == "peft" else version(name)
    )
    before = snapshot()
    with pytest.raises(RuntimeError, match=r"peft 99\.1 is not known.*0\.21\.2"):
        compat.enable("peft")
    with pytest.raises(RuntimeError, match=r"peft 99\.1"):
        compat.enable()
    assert changed(before) == set()


@pytest.mark.parametrize(
    ("tools", "options", "error", "message"),
    [
        (("torch",), {}, ValueError, "not for 'torch'"),
        (("peft",), {"tol": 0}, ValueError, "positive"),
        (("peft",), {"backend": "opencl"}, ValueError, "opencl"),
    ],
    ids=["tool", "tol", "backend"],
)
def test_refuses(tools, options, error, message):
    with pytest.raises(error, match=message):
        compat.enable(*tools, **options)


def test_says_when_a_tool_is_missing(monkeypatch):
    def missing(name):
        raise _switch.PackageNotFoundError(name)

    monkeypatch.setattr(_switch, "version", missing)
    with pytest.raises(RuntimeError, match="peft is not installed"):
        compat.enable("peft")
    with pytest.raises(RuntimeError, match="none of peft, mergekit"):
        compat.enable()


LAZY = """
import sys
import lorax_kernels
from lorax_kernels import compat

def waits():
    return any(type(x).__module__.startswith("lorax") for x in sys.meta_path)

with compat.enable("peft"):
    assert waits()
assert not waits()
with compat.enable("peft"):
    assert "peft" not in sys.modules
    import peft.utils.loftq_utils as loftq
    import torch
    assert loftq.__loader__.__class__.__module__.startswith("_frozen_importlib")
    assert loftq.__spec__.loader is loftq.__loader__
    assert loftq._low_rank_decomposition(torch.randn(6, 5), 2)["S"].shape == (2,)
assert loftq._low_rank_decomposition(torch.randn(6, 5), 2)["S"].shape == (5,)
assert not waits()
"""


def test_imports_nothing_and_patches_what_is_imported_later():
    done = subprocess.run(
        [sys.executable, "-c", LAZY], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_import_callback_survives_a_failing_import(tmp_path, monkeypatch):
    (tmp_path / "breaks_once.py").write_text("import flag_for_it\nvalue = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    called = []
    _imports.when_imported("breaks_once", lambda: called.append(1))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("breaks_once")
    assert called == []
    (tmp_path / "flag_for_it.py").write_text("")
    importlib.invalidate_caches()
    assert importlib.import_module("breaks_once").value == 1
    assert called == [1]
    assert _imports._finder not in sys.meta_path


@pytest.fixture
def _argv(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["python"])
    monkeypatch.setattr(sys, "path", list(sys.path))


@pytest.mark.usefixtures("_argv")
def test_runs_a_script_under_the_switch(tmp_path, capsys):
    (tmp_path / "beside.py").write_text("name = 'beside'\n")
    script = tmp_path / "user.py"
    script.write_text(
        "import sys, beside\n"
        "from lorax_kernels.compat import _switch\n"
        "print(sys.argv[1:], __name__, beside.name, _switch.active('peft').tol)\n"
        "sys.exit(3)\n"
    )
    with pytest.raises(SystemExit) as ended:
        main([str(script), "--flag", "x"])
    assert ended.value.code == 3
    assert capsys.readouterr().out == "['--flag', 'x'] __main__ beside 0.001\n"


@pytest.mark.usefixtures("_argv")
def test_runs_a_console_command_under_the_switch(monkeypatch, tmp_path):
    (tmp_path / "a_tool.py").write_text(
        "import sys\n"
        "from lorax_kernels.compat import _switch\n"
        "def main():\n"
        "    return f'{sys.argv} {_switch.active(\"peft\") is not None}'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("a-tool", "a_tool:main", "console_scripts")
    monkeypatch.setattr(runner, "entry_points", lambda group: [point])
    with pytest.raises(SystemExit, match=r"\['a-tool', '-x'\] True"):
        main(["a-tool", "-x"])


@pytest.mark.usefixtures("_argv")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [([], "usage"), (["--help"], None), (["no-such-command"], "neither a Python script")],
    ids=["nothing", "help", "unknown"],
)
def test_runs_nothing_else(arguments, status, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    if status is None:
        assert ended.value.code in (None, 0)
        assert "usage" in capsys.readouterr().out
    else:
        assert status in str(ended.value.code)
    assert not any(door.is_open for door in compat.doors())
