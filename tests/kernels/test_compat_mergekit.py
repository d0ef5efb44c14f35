# SPDX-License-Identifier: Apache-2.0
"""The door into mergekit: the replacement by itself, and mergekit-extract-lora where installed.

mergekit is no dependency of the tests: `pip install mergekit==0.1.5` brings the second half to run.
"""

import importlib.util
import json
from types import SimpleNamespace

import pytest
import torch

from lorax_kernels import compat
from lorax_kernels.compat import _mergekit
from lorax_kernels.compat._switch import Options

OPTIONS = Options(1e-3, "auto")


def task(**changes):
    usual = {"max_rank": 4, "distribute_scale": True, "transpose": False, "sv_epsilon": 0}
    return SimpleNamespace(**{**usual, **changes})


def refused(*_):
    raise AssertionError("left to the original")


@pytest.mark.parametrize("transpose", [False, True], ids=["weight", "embedding"])
@pytest.mark.parametrize("distribute", [False, True], ids=["in A", "in both"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_factors(dtype, distribute, transpose):
    delta = torch.randn(30, 20).to(dtype)
    found = task(distribute_scale=distribute, transpose=transpose)
    A, B = _mergekit._execute(OPTIONS, refused, found, delta)
    wanted = delta.float().T if transpose else delta.float()
    U, S, Vh = torch.linalg.svd(wanted, full_matrices=False)
    assert (A.dtype, B.dtype) == (dtype, dtype)
    assert (B.shape, A.shape) == ((wanted.shape[0], 4), (4, wanted.shape[1]))
    best = (U[:, :4] * S[:4]) @ Vh[:4]
    error = torch.linalg.norm(B.float() @ A.float() - best) / torch.linalg.norm(best)
    # The tolerance, and the rounding of two factors.
    assert error <= 1e-3 + 2 * torch.finfo(dtype).eps
    norms = torch.linalg.vector_norm(B.float(), dim=0)
    torch.testing.assert_close(
        norms, S[:4].sqrt() if distribute else torch.ones(4), rtol=1e-2, atol=0
    )


def test_small_values_are_cut_off():
    delta = torch.diag(torch.tensor([3.0, 2.0, 1e-3, 1e-4]))
    A, B = _mergekit._execute(OPTIONS, refused, task(sv_epsilon=0.1), delta)
    assert (A.shape, B.shape) == ((2, 4), (4, 2))
    A, B = _mergekit._execute(OPTIONS, refused, task(sv_epsilon=9.0), delta)
    assert (A.shape, B.shape) == ((0, 4), (4, 0))


def test_an_unchanged_weight_gives_zeros():
    A, B = _mergekit._execute(OPTIONS, refused, task(), torch.zeros(6, 5))
    assert bool((B @ A == 0).all())


def test_what_is_no_matrix_is_left_to_mergekit():
    original = lambda _, vector: ("original", vector.shape)  # noqa: E731
    assert _mergekit._execute(OPTIONS, original, task(), torch.ones(3))[0] == "original"


@pytest.mark.skipif(
    importlib.util.find_spec("mergekit") is None, reason="mergekit is not installed"
)
@pytest.mark.filterwarnings("ignore")
def test_the_real_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers
    from safetensors.torch import load_file

    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")

    from mergekit.scripts import extract_lora

    method = vars(extract_lora.TaskVectorDecompositionTask)["execute"]
    results = {}
    for name in ("plain", "ours"):
        arguments = ["--model", str(tmp_path / "tuned"), "--base-model", str(tmp_path / "base")]
        arguments += ["--out-path", str(tmp_path / name), "--max-rank", "6"]
        arguments += ["--exclude-regex", "embed|lm_head|norm"]
        handle = compat.enable("mergekit") if name == "ours" else None
        extract_lora.main.main(args=arguments, standalone_mode=False)
        if handle is not None:
            assert vars(extract_lora.TaskVectorDecompositionTask)["execute"] is not method
            handle.disable()
        results[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert vars(extract_lora.TaskVectorDecompositionTask)["execute"] is method
    assert results["plain"].keys() == results["ours"].keys()
    for key in [key for key in results["plain"] if "lora_A" in key]:
        pairs = [(x[key.replace("lora_A", "lora_B")], x[key]) for x in results.values()]
        plain, ours = (B @ A for B, A in pairs)
        assert torch.linalg.norm(ours - plain) <= 1e-3 * torch.linalg.norm(plain)
    ranks = [json.loads((tmp_path / x / "adapter_config.json").read_text())["r"] for x in results]
    assert ranks == [6, 6]
