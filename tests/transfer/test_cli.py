# SPDX-License-Identifier: Apache-2.0
"""The command line: exit codes, what goes to which stream, and that every option arrives."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from adapter_makers import llama
from pairs import everything_in, make_pair
from typer.testing import CliRunner

import lorax_transfer
from lorax_transfer import cli
from lorax_transfer.adapters import DROPPABLE, read_adapter


@pytest.fixture
def pair(tmp_path):
    return make_pair(tmp_path, llama, target_modules=["q_proj", "v_proj"])


def run(*arguments, **environment):
    environment = {"COLUMNS": "100", "TERM": "dumb", **environment}
    return CliRunner().invoke(cli.app, [str(x) for x in arguments], env=environment)


def models(pair):
    return [pair.adapter, "--source", pair.source, "--target", pair.target]


def test_transfer_writes_and_reports(pair, tmp_path):
    result = run(
        "transfer",
        *models(pair),
        *("--output", tmp_path / "out", "--rank", 8),
        *("--report", tmp_path / "r.json", "--plot", tmp_path / "r.png"),
    )
    assert result.exit_code == 0, result.output
    assert len(read_adapter(tmp_path / "out").layers) == 4
    assert "Wrote 4 of 4 layers" in result.stdout
    assert json.loads((tmp_path / "r.json").read_text())["output"] == str(tmp_path / "out")
    assert (tmp_path / "r.png").stat().st_size > 10_000


@pytest.mark.parametrize("command", ["transfer", "scan"])
def test_json_is_all_of_stdout(pair, tmp_path, command):
    more = ["--output", tmp_path / "out"] if command == "transfer" else []
    result = run(command, *models(pair), *more, "--rank", 8, "--json")
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["kind"] == command
    assert len(data["layers"]) == 4
    assert data["command"].startswith("lorax-transfer ")


def test_scan_writes_nothing(pair, tmp_path):
    before = everything_in(tmp_path)
    result = run("scan", *models(pair), "--rank", 8)
    assert result.exit_code == 0
    assert "Recommendation" in result.stdout
    assert everything_in(tmp_path) == before


def test_dry_run_prints_the_plan(pair, tmp_path):
    before = everything_in(tmp_path)
    result = run("transfer", *models(pair), "--dry-run")
    assert result.exit_code == 0
    assert "Nothing was read or written" in result.stdout
    assert "0.self_attn.q_proj" in result.stdout
    assert "of memory" in result.stdout
    assert everything_in(tmp_path) == before


def test_quiet_prints_nothing(pair, tmp_path):
    # The same model twice would be warned about.
    result = run(
        *("transfer", pair.adapter, "--source", pair.source, "--target", pair.source),
        *("-o", tmp_path / "out", "-q"),
    )
    assert result.exit_code == 0
    assert result.output == ""


def test_warnings_go_to_stderr(pair):
    result = run("scan", pair.adapter, "--source", pair.source, "--target", pair.source, "--json")
    assert "identical" in result.stderr
    json.loads(result.stdout)


def test_strict_fails(pair, tmp_path):
    result = run(
        *("transfer", *models(pair), "-o", tmp_path / "out"),
        *("--rank", 4, "--min-similarity", 0.999, "--strict"),
    )
    assert result.exit_code == 1
    assert "strict" in result.stderr
    assert not (tmp_path / "out").exists()


def test_error_is_one_line_on_stderr(pair, tmp_path):
    result = run(
        "transfer", pair.adapter, "--source", tmp_path / "no", "--target", pair.target, "-o", "x"
    )
    assert result.exit_code == 1
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: No checkpoint at ")


@pytest.mark.parametrize(
    "arguments",
    [
        ["transfer"],
        ["transfer", "a", "--source", "b", "--target", "c"],
        ["transfer", "a", "--source", "b", "--target", "c", "-o", "d", "--method", "rotate"],
        ["scan", "a", "--source", "b", "--target", "c", "--rank", "0"],
        ["scan", "a", "--source", "b", "--target", "c", "--output", "d"],
        ["move"],
    ],
    ids=["nothing", "no-output", "bad-method", "bad-rank", "scan-output", "bad-command"],
)
def test_usage_errors(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr


def test_interrupt_is_no_traceback(pair, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("lorax_transfer.engine.Engine.run", interrupt)
    before = everything_in(tmp_path)
    result = run("transfer", *models(pair), "-o", tmp_path / "out")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert "Traceback" not in result.output
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("command", ["transfer", "scan"])
def test_every_option_of_the_function_is_an_option_of_the_command(command):
    taken = set(inspect.signature(getattr(lorax_transfer, command)).parameters)
    offered = set(inspect.signature(getattr(cli, command)).parameters)
    # What a caller gives and the command line itself does.
    assert taken - offered == {"progress", "command"}
    assert offered - taken == {"as_json", "verbose", "quiet"}


@pytest.mark.parametrize("command", ["transfer", "scan"])
def test_every_option_arrives(command, monkeypatch):
    seen = {}
    monkeypatch.setattr(f"lorax_transfer._api.{command}", lambda *a, **k: seen.update(k, a=a))
    monkeypatch.setattr(cli, "_print_report", lambda *_: None)
    options = {
        "method": "prolora",
        "rank": 7,
        "energy": 0.5,
        "min_similarity": 0.25,
        "include": "x",
        "exclude": "y",
        "device": "cuda:3",
        "backend": "triton",
    }
    if command == "transfer":
        options["dtype"] = "bf16"
    flags = [
        part for key, value in options.items() for part in (f"--{key.replace('_', '-')}", value)
    ]
    flags += ["--drop", "dora", "--drop", "bias"]
    flags += ["--cache", "c", "--report", "r.json", "--plot", "p.png"]
    if command == "transfer":
        flags += ["-o", "out", "--dry-run", "--strict", "--overwrite"]
    result = run(command, "a", "--source", "s", "--target", "t", *flags)
    assert result.exit_code == 0, result.output
    paths = {"cache": Path("c"), "report": Path("r.json"), "plot": Path("p.png")}
    wanted = {**options, **paths, "drop": ["dora", "bias"]}
    if command == "transfer":
        wanted.update(dry_run=True, strict=True, overwrite=True)
        assert seen["a"] == ("a", "s", "t", Path("out"))
    assert {key: seen[key] for key in wanted} == wanted


def test_help_names_every_kind_that_can_be_dropped():
    text = " ".join(run("transfer", "--help", COLUMNS="160").stdout.split())
    assert all(kind in text for kind in DROPPABLE)
    assert "320" in text


def test_info_json():
    result = run("info", "--json")
    facts = json.loads(result.stdout)
    assert [row["name"] for row in facts["backends"]] == ["cuda", "triton", "reference"]
    reference = facts["backends"][-1]
    assert reference["available"]
    assert "gram" in reference["ops"]
    assert all(row["reason"] for row in facts["backends"])
    assert facts["versions"]["torch"]


def test_info_table_gives_reasons():
    from lorax_transfer.info import info

    text = " ".join(run("info").stdout.split())
    for row in info()["backends"]:
        assert row["name"] in text
        assert " ".join(row["reason"].split()[:4]) in text


def test_info_survives_missing_packages(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr("lorax_transfer.info.version", missing)
    facts = json.loads(run("info", "--json").stdout)
    assert {row["version"] for row in facts["packages"]} == {None}
    assert run("info").exit_code == 0


@pytest.mark.parametrize("arguments", [[], ["--output", "there"]], ids=["default", "output"])
def test_demo_is_the_packages_demo(arguments, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "lorax_transfer.demo.run.show_demo",
        lambda output, overwrite: seen.append((output, overwrite)),
    )
    assert run("demo", *arguments).exit_code == 0
    assert seen == [(Path(arguments[1]), False) if arguments else (Path("lorax-demo"), True)]


def python(*arguments, **options):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, **options
    )


def test_help_and_version_need_no_torch():
    code = (
        "import sys; from lorax_transfer import cli\n"
        "try: cli.app(['--version'])\n"
        "except SystemExit as end: assert end.code in (0, None)\n"
        "assert 'torch' not in sys.modules"
    )
    result = python("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("lorax-transfer ")


def test_as_a_real_process(pair, tmp_path):
    """The whole way once: exit codes, streams and files of a process, and no stray output."""
    environment = {**os.environ, "COLUMNS": "100"}
    base = ["-m", "lorax_transfer.cli", "transfer", *map(str, models(pair)), "--rank", "8"]
    good = python(*base, "--output", str(tmp_path / "out"), "--json", env=environment)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["totals"]["transferred"] == 4
    assert good.stderr == ""
    again = python(*base, "--output", str(tmp_path / "out"), env=environment)
    assert again.returncode == 1
    assert again.stdout == ""
    assert again.stderr == (
        f"error: {tmp_path}/out already exists; choose another output or ask to overwrite it "
        "(--overwrite).\n"
    )
