# SPDX-License-Identifier: Apache-2.0
"""A LoRA-X adapter moved to another base: against the formula in float64, in either form."""

import json
from pathlib import Path

import adapter_makers
import lorax_makers
import oracle
import pairs
import pytest
import torch
from typer.testing import CliRunner

import lorax_transfer
from lorax_transfer import cli
from lorax_transfer.adapters import read_adapter
from lorax_transfer.adapters.lorax import read_lorax
from lorax_transfer.errors import MatchError, TransferError
from lorax_transfer.peft import load_lorax_adapter

RANK = 6
KINDS = ["llama", "gpt2", "convnet"]


class Bed:
    """A source with a LoRA-X adapter and a target, on disk and in memory."""

    def __init__(self, root: Path, kind: str, **options: object) -> None:
        self.kind, self.root = kind, root
        self.source = lorax_makers.MODELS[kind]()
        self.target = lorax_makers.trained_copy(self.source)
        pairs.save_model(self.source, root / "source")
        pairs.save_model(self.target, root / "target")
        self.adapted = lorax_makers.saved(kind, root / "adapter", RANK, **options)

    def transfer(self, **options: object) -> lorax_transfer.Report:
        places = [self.root / name for name in ("adapter", "source", "target", "out")]
        return lorax_transfer.transfer(*places, **options)

    def bases(self, name: str, rank: int) -> list[tuple[torch.Tensor, ...]]:
        found = []
        for model in (self.source, self.target):
            module = model.get_submodule(name)
            weight = pairs.as_matrix(module, module.weight.detach())
            found.append(oracle.exact_svd(weight, min(rank, *weight.shape)))
        return found

    def moved(self, name: str, dW: torch.Tensor) -> torch.Tensor:
        """`U_t (U_t^T U_s) C (V_s^T V_t) V_t^T`, with C read off the update itself."""
        source, target = self.bases(name, RANK)
        C = source[0].T @ dW @ source[2]
        return target[0] @ oracle.lorax_core(C, source, target) @ target[2].T


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{"core": "diagonal", "scale": 2.0}, {"core": "full"}], ids=["diagonal", "full"]
)
def test_native_to_native_is_the_formula(tmp_path: Path, kind: str, options: dict) -> None:
    bed = Bed(tmp_path, kind, **options)
    report = bed.transfer()
    moved = load_lorax_adapter(bed.target, tmp_path / "out")
    before, after = lorax_makers.deltas(bed.adapted), lorax_makers.deltas(moved)
    assert after.keys() == before.keys()
    for name, dW in before.items():
        expected = bed.moved(name, dW)
        # Bases rounded to float32 over gaps of a hundredth.
        assert (after[name] - expected).norm() < 1e-5 * dW.norm()
    assert report.adapter.format == "lorax"
    assert read_lorax(tmp_path / "out").config["base_model_name_or_path"] == str(
        tmp_path / "target"
    )


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *(("llama", method) for method in ("lorax", "prolora", "transport", "copy")),
        ("gpt2", "lorax"),
        ("convnet", "transport"),
    ],
)
def test_native_to_factors_is_every_method(tmp_path: Path, kind: str, method: str) -> None:
    bed = Bed(tmp_path, kind)
    report = bed.transfer(method=method, form="lora", rank=RANK if kind != "convnet" else 5)
    updates = pairs.updates(bed.target, tmp_path / "out")
    rank = RANK if kind != "convnet" else 5
    for name, dW in lorax_makers.deltas(bed.adapted).items():
        source, target = bed.bases(name, rank)
        expected = {
            "copy": lambda dW=dW: dW,
            "lorax": lambda dW=dW, t=target: oracle.lorax(dW, t),
            "prolora": lambda dW=dW, s=source, t=target: oracle.best_rank(
                oracle.prolora(dW, s, t), torch.linalg.matrix_rank(dW, rtol=1e-5)
            ),
            "transport": lambda dW=dW, s=source, t=target: (
                oracle.direct_rotation(s[0], t[0]) @ dW @ oracle.direct_rotation(s[2], t[2]).T
            ),
        }[method]()
        assert (updates[name] - expected).norm() < 1e-4 * dW.norm(), name
        outcome = next(x for x in report.layers if x.module == name).outcomes[method]
        assert outcome.norm_ratio == pytest.approx(float(expected.norm() / dW.norm()), rel=1e-3)


def test_transport_stays_in_the_bases_and_copy_leaves_them(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "llama")
    bed.transfer(method="transport")
    moved = load_lorax_adapter(bed.target, tmp_path / "out")
    for name, dW in lorax_makers.deltas(moved).items():
        # A rotation keeps the norm.
        before = lorax_makers.deltas(bed.adapted)[name].norm()
        assert float(dW.norm() / before) == pytest.approx(1, abs=1e-4)
    bed.transfer(method="copy", overwrite=True)
    assert read_adapter(tmp_path / "out").layers
    with pytest.raises(TransferError, match="out of the target's leading subspaces"):
        bed.transfer(method="copy", form="lorax", overwrite=True)


def test_to_the_same_base_nothing_changes(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "llama")
    places = [tmp_path / name for name in ("adapter", "source", "source", "out")]
    lorax_transfer.transfer(*places)
    moved = load_lorax_adapter(lorax_makers.MODELS["llama"](), tmp_path / "out")
    torch.testing.assert_close(
        lorax_makers.run(moved.eval()), lorax_makers.run(bed.adapted), rtol=0, atol=1e-5
    )


def test_between_widths_coordinates_are_copied(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "convnet")
    torch.manual_seed(9)
    wide = torch.nn.ModuleDict(
        {"conv": torch.nn.Conv2d(3, 12, 3, padding=1), "head": torch.nn.Linear(12, 5)}
    )
    pairs.save_model(wide, tmp_path / "wide")
    places = [tmp_path / name for name in ("adapter", "source", "wide", "out")]
    report = lorax_transfer.transfer(*places)
    assert report.totals.unvalidated == 2
    found = read_lorax(tmp_path / "out")
    for name, layer in found.layers.items():
        core = bed.adapted.base_model.model.get_submodule(name).core_of("default").weight
        torch.testing.assert_close(layer.weight, core.detach(), rtol=0, atol=1e-5)


def test_command_line_and_dry_run(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "gpt2")
    arguments = ["transfer", str(tmp_path / "adapter"), "--json"]
    arguments += ["--source", str(tmp_path / "source"), "--target", str(tmp_path / "target")]
    dry = CliRunner().invoke(cli.app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0, dry.output
    planned = json.loads(dry.stdout)
    assert {layer["rank"] for layer in planned["layers"]} == {RANK}
    output = ["-o", str(tmp_path / "out"), "--form", "lora"]
    done = CliRunner().invoke(cli.app, [*arguments, *output])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["totals"]["transferred"] == len(planned["layers"])
    adapter_makers.load_adapter(bed.target, tmp_path / "out")


def test_scan_measures_it(tmp_path: Path) -> None:
    bed = Bed(tmp_path, "llama")
    places = [tmp_path / name for name in ("adapter", "source", "target")]
    report = lorax_transfer.scan(*places)
    for layer in report.layers:
        dW = lorax_makers.deltas(bed.adapted)[layer.module]
        kept = bed.moved(layer.module, dW).square().sum() / dW.square().sum()
        assert layer.outcomes["lorax"].energy_kept == pytest.approx(float(kept), rel=1e-4)
        assert layer.outcomes["copy"].energy_kept == pytest.approx(1, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"dtype": "bf16"}, "cores are float32", id="dtype"),
        pytest.param({"form": "peft"}, "form is 'peft'", id="form"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, options: dict, message: str) -> None:
    bed = Bed(tmp_path, "convnet")
    with pytest.raises(TransferError, match=message):
        bed.transfer(**options)
    assert not (tmp_path / "out").exists()


def test_cores_of_an_ordinary_lora_are_refused(tmp_path: Path) -> None:
    pair = pairs.make_pair(tmp_path, adapter_makers.llama, target_modules=["q_proj"])
    with pytest.raises(TransferError, match="is an ordinary LoRA"):
        lorax_transfer.transfer(
            pair.adapter, pair.source, pair.target, tmp_path / "out", form="lorax"
        )


def test_the_wrong_source_is_refused(tmp_path: Path) -> None:
    Bed(tmp_path, "llama")
    places = [tmp_path / name for name in ("adapter", "target", "source", "out")]
    with pytest.raises(MatchError, match="not the weight that the core of"):
        lorax_transfer.transfer(*places)


def test_a_device_that_is_too_small_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = Bed(tmp_path, "convnet")

    def full(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lorax_transfer._run.expand", full)
    with pytest.raises(TransferError, match="too little memory"):
        bed.transfer()
