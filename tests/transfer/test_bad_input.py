# SPDX-License-Identifier: Apache-2.0
"""Bad input, through the function and through the command line: a sentence, status 1, no output."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from adapter_makers import gpt2, llama
from pairs import Pair, everything_in, make_pair, save_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import lorax_transfer
from lorax_transfer import cli
from lorax_transfer.errors import (
    AdapterError,
    CheckpointError,
    MatchError,
    OutputError,
    TransferError,
)

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
WEIGHTS, FACTORS = "model.safetensors", "adapter_model.safetensors"


def loaded(file: Path) -> dict[str, torch.Tensor]:
    """Copies: what load_file returns lives in the file that is about to be replaced."""
    return {name: tensor.clone() for name, tensor in load_file(file).items()}


def change(file: Path, edit) -> None:
    tensors = loaded(file)
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def configure(pair: Pair, **changes) -> None:
    file = pair.adapter / "adapter_config.json"
    config = {**json.loads(file.read_text()), **changes}
    kept = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(kept))


def shard(pair: Pair) -> list[Path]:
    (pair.target / WEIGHTS).unlink()
    save_model(pair.target_model, pair.target, max_shard_size="20KB")
    return sorted(pair.target.glob("*.safetensors"))


def poison(file: Path, name: str, value: float) -> None:
    def edit(tensors):
        tensors[name][1, 2] = value

    change(file, edit)


def a_missing_target(pair):
    (pair.target / WEIGHTS).unlink()


def a_missing_adapter(pair):
    (pair.adapter / FACTORS).unlink()


def a_truncated_target(pair):
    file = pair.target / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def a_truncated_adapter(pair):
    file = pair.adapter / FACTORS
    file.write_bytes(file.read_bytes()[:-100])


def a_missing_shard(pair):
    shard(pair)[1].unlink()


def nan_in_the_target(pair):
    poison(pair.target / WEIGHTS, Q_PROJ, float("nan"))


def inf_in_the_source(pair):
    poison(pair.source / WEIGHTS, Q_PROJ, float("inf"))


def nan_in_a_factor(pair):
    name = f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_B.weight"
    poison(pair.adapter / FACTORS, name, float("nan"))


def a_source_of_another_size(pair):
    config = llama().config
    config.hidden_size, config.head_dim = 48, 12
    import transformers

    save_model(transformers.LlamaForCausalLM(config), pair.source)


def a_source_of_another_architecture(pair):
    save_model(gpt2(), pair.source)


def a_target_with_fewer_layers(pair):
    def edit(tensors):
        for name in [name for name in tensors if ".layers.1." in name]:
            del tensors[name]

    change(pair.target / WEIGHTS, edit)


def a_pickle_for_the_adapter(pair):
    torch.save(loaded(pair.adapter / FACTORS), pair.adapter / FACTORS)


def a_bare_pickle_for_the_target(pair):
    (pair.target / WEIGHTS).write_bytes(pickle.dumps({"a": 1}))


def no_r(pair):
    configure(pair, r=...)


def another_r(pair):
    configure(pair, r=5)


def another_peft_method(pair):
    configure(pair, peft_type="VERA")


def dora(pair):
    configure(pair, use_dora=True)


def nothing(pair):
    pass


CASES = {
    "missing-target": (a_missing_target, {}, CheckpointError, ["No weights in", "target"]),
    "missing-adapter": (a_missing_adapter, {}, AdapterError, [FACTORS]),
    "truncated-target": (a_truncated_target, {}, CheckpointError, [WEIGHTS, "truncated"]),
    "truncated-adapter": (a_truncated_adapter, {}, AdapterError, [FACTORS, "not a complete"]),
    "missing-shard": (a_missing_shard, {}, CheckpointError, ["model-00002-of", "index"]),
    "nan-weight": (nan_in_the_target, {}, CheckpointError, [Q_PROJ, "target", "NaN or Inf"]),
    "inf-weight": (inf_in_the_source, {}, CheckpointError, [Q_PROJ, "source", "NaN or Inf"]),
    "nan-factor": (nan_in_a_factor, {}, AdapterError, ["q_proj.lora_B", "NaN or Inf"]),
    "rank-too-large": (nothing, {"rank": 40}, TransferError, ["rank 40", "shorter side", "32"]),
    "other-source": (
        a_source_of_another_size,
        {},
        MatchError,
        [Q_PROJ, "(48, 48)", "expected (32, 32)"],
    ),
    "other-architecture": (
        a_source_of_another_architecture,
        {},
        MatchError,
        ["no module of the adapter", "model.layers.0.self_attn.q_proj", "transformer."],
    ),
    "fewer-layers": (
        a_target_with_fewer_layers,
        {},
        MatchError,
        ["model.layers.1.self_attn.q_proj", "--exclude", "--method aligned"],
    ),
    "pickled-adapter": (a_pickle_for_the_adapter, {}, AdapterError, ["pickle", FACTORS]),
    "pickled-target": (a_bare_pickle_for_the_target, {}, CheckpointError, ["pickle", WEIGHTS]),
    "no-r": (no_r, {}, AdapterError, ["r = None", "adapter_config.json"]),
    "other-r": (another_r, {}, AdapterError, ["rank 5", "rank 4"]),
    "other-method": (another_peft_method, {}, AdapterError, ["VERA", "LORA"]),
    "dora": (dora, {}, AdapterError, ["--drop dora"]),
    "bad-energy": (nothing, {"energy": 1.5}, TransferError, ["energy is 1.5"]),
    "bad-regex": (nothing, {"include": "("}, TransferError, ["include is '('"]),
    "bad-drop": (nothing, {"drop": ["everything"]}, AdapterError, ["'everything'", "dora"]),
    "bad-device": (nothing, {"device": "cuda:99"}, TransferError, ["cuda:99"]),
    "report-name": (nothing, {"report": "weights.bin"}, OutputError, ["weights.bin", ".json"]),
    "plot-name": (nothing, {"plot": "weights.bin"}, OutputError, ["weights.bin", ".png"]),
}


def check_function(pair, output, error, words, **options):
    with pytest.raises(error) as caught:
        lorax_transfer.transfer(pair.adapter, pair.source, pair.target, output, **options)
    check_sentence(str(caught.value), words)


def check_command(pair, output, words, **options):
    flags = []
    for key, value in options.items():
        if isinstance(value, bool):
            flags += [f"--{key.replace('_', '-')}"]
            continue
        for one in value if isinstance(value, list) else [value]:
            flags += [f"--{key.replace('_', '-')}", str(one)]
    base = [pair.adapter, "--source", pair.source, "--target", pair.target, "--output", output]
    result = CliRunner().invoke(cli.app, ["transfer", *map(str, base), *flags])
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    check_sentence(line.removeprefix("error: "), words)


def check_sentence(text: str, words: list[str]) -> None:
    for word in words:
        assert word in text
    assert text.endswith(".")
    assert "\n" not in text
    assert "Traceback" not in text


@pytest.mark.parametrize("case", CASES)
def test_bad_input(tmp_path, case):
    spoil, options, error, words = CASES[case]
    pair = make_pair(tmp_path, llama, target_modules=["q_proj", "v_proj"])
    spoil(pair)
    before = everything_in(tmp_path)
    check_function(pair, tmp_path / "new" / "out", error, words, **options)
    check_command(pair, tmp_path / "new" / "out", words, **options)
    assert everything_in(tmp_path) == before


class TestOutput:
    @pytest.fixture
    def pair(self, tmp_path):
        return make_pair(tmp_path, llama, target_modules=["q_proj"])

    def test_that_exists(self, tmp_path, pair):
        (tmp_path / "out").mkdir()
        check_function(pair, tmp_path / "out", OutputError, ["already exists", "--overwrite"])
        check_command(pair, tmp_path / "out", ["already exists", "--overwrite"])
        assert list((tmp_path / "out").iterdir()) == []

    def test_that_is_more_than_an_adapter(self, tmp_path, pair):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        check_function(pair, tmp_path / "out", OutputError, ["not overwritten"], overwrite=True)
        check_command(pair, tmp_path / "out", ["not overwritten"], overwrite=True)
        assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"

    def test_overwrite_replaces_an_adapter(self, tmp_path, pair):
        place = tmp_path / "out"
        for rank in (4, 8):
            lorax_transfer.transfer(
                pair.adapter, pair.source, pair.target, place, rank=rank, overwrite=True
            )
        assert "| Rank | 8 |" in (place / "README.md").read_text()

    def test_under_a_file(self, tmp_path, pair):
        (tmp_path / "file").write_text("")
        check_function(pair, tmp_path / "file" / "out", OutputError, ["cannot write"])
        check_command(pair, tmp_path / "file" / "out", ["cannot write"])

    def test_read_only(self, tmp_path, pair, monkeypatch):
        # Permissions do not bind every user, so the system's answer is given in its place.
        monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
        check_function(pair, tmp_path / "out", OutputError, ["cannot write", str(tmp_path)])
        check_command(pair, tmp_path / "out", ["cannot write", str(tmp_path)])

    def test_no_output(self, pair):
        with pytest.raises(OutputError, match="no output was given"):
            lorax_transfer.transfer(pair.adapter, pair.source, pair.target)

    def test_a_disk_that_fills_up(self, tmp_path, pair, monkeypatch):
        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("lorax_transfer.adapters.peft.save_file", full)
        before = everything_in(tmp_path)
        words = ["cannot write", "No space left"]
        check_function(pair, tmp_path / "out", OutputError, words)
        check_command(pair, tmp_path / "out", words)
        assert everything_in(tmp_path) == before

    def test_a_factor_that_does_not_fit(self, tmp_path, pair):
        def edit(tensors):
            for name in tensors:
                if "lora_B" in name:
                    tensors[name] *= 1e7

        change(pair.adapter / FACTORS, edit)
        words = ["not finite as torch.float16", "--dtype"]
        check_function(pair, tmp_path / "out", OutputError, words, dtype="fp16")
        check_command(pair, tmp_path / "out", words, dtype="fp16")
