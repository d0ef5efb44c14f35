# SPDX-License-Identifier: Apache-2.0
"""Safetensors checkpoints: layouts, laziness, and one clear sentence for each kind of bad input."""

import hashlib
import json
import os
import pickle
import re

import pytest
import torch
from safetensors.torch import save_file

from lorax_transfer.checkpoints import Checkpoint, open_checkpoint
from lorax_transfer.errors import CheckpointError, TransferError

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
]


def weights(seed=0, **shapes):
    generator = torch.Generator().manual_seed(seed)
    return {
        name.replace("__", "."): torch.randn(shape, generator=generator)
        for name, shape in shapes.items()
    }


def save_sharded(folder, shards, stem="model.safetensors", **index):
    """Writes shards ({file name: tensors}) and the index that names them."""
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    content = {"metadata": {}, "weight_map": weight_map, **index}
    (folder / f"{stem}.index.json").write_text(json.dumps(content))


def check_reads(checkpoint: Checkpoint, expected):
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) is tensor.dtype
        # Bits and not values: the file holds them unchanged.
        read = checkpoint.read(name)
        assert read.dtype is tensor.dtype
        assert read.is_contiguous()
        assert torch.equal(read.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def error_of(path, **options):
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message


@pytest.fixture
def two_shards():
    return {
        "model-00001-of-00002.safetensors": weights(a__weight=(3, 5), b__weight=(4,)),
        "model-00002-of-00002.safetensors": weights(1, c__weight=(2, 2, 2)),
    }


class TestLayouts:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype_reads_back_bit_for_bit(self, tmp_path, dtype):
        tensors = {
            "matrix": torch.arange(-7, 8).reshape(3, 5).to(dtype),
            "scalar": torch.tensor(3).to(dtype),
            "empty": torch.empty(0, 4, dtype=dtype),
        }
        save_file(tensors, tmp_path / "model.safetensors")
        check_reads(open_checkpoint(tmp_path), tensors)

    def test_names_come_in_file_order(self, tmp_path):
        # save_file orders by dtype size first, which is not the order of the names.
        tensors = {"a": torch.zeros(2, dtype=torch.float16), "b": torch.zeros(2)}
        save_file(tensors, tmp_path / "model.safetensors")
        assert open_checkpoint(tmp_path).names() == ["b", "a"]

    @pytest.mark.parametrize(
        "stem",
        ["model.safetensors", "diffusion_pytorch_model.safetensors"],
        ids=["hf", "diffusers"],
    )
    def test_sharded_directory(self, tmp_path, two_shards, stem):
        save_sharded(tmp_path, two_shards, stem)
        checkpoint = open_checkpoint(tmp_path)
        check_reads(checkpoint, {k: v for shard in two_shards.values() for k, v in shard.items()})
        assert [path.name for path in checkpoint.files()] == list(two_shards)

    @pytest.mark.parametrize(
        "name",
        ["model.safetensors", "diffusion_pytorch_model.safetensors", "other.safetensors"],
        ids=["hf", "diffusers", "only-one"],
    )
    def test_single_file_by_directory_and_by_name(self, tmp_path, name):
        tensors = weights(w=(2, 3))
        save_file(tensors, tmp_path / name)
        for spec in (tmp_path, str(tmp_path / name)):
            with open_checkpoint(spec) as checkpoint:
                check_reads(checkpoint, tensors)
                assert checkpoint.format == "safetensors"
                assert checkpoint.location == str(spec)
                assert checkpoint.revision is None

    def test_model_safetensors_wins_over_other_files(self, tmp_path):
        tensors = weights(w=(2, 3))
        save_file(tensors, tmp_path / "model.safetensors")
        save_file(weights(x=(1,)), tmp_path / "consolidated.safetensors")
        check_reads(open_checkpoint(tmp_path), tensors)

    def test_tensor_that_the_index_forgets_is_kept_and_a_stale_copy_is_not(
        self, tmp_path, two_shards
    ):
        first, second = two_shards
        save_sharded(tmp_path, two_shards)
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        stale = {**two_shards[second], "a.weight": torch.zeros(3, 5)}
        save_file(stale, tmp_path / second)
        del index["weight_map"]["b.weight"]
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        check_reads(open_checkpoint(tmp_path), {**two_shards[first], **two_shards[second]})

    def test_config_lies_beside_the_weights(self, tmp_path):
        save_file(weights(w=(1,)), tmp_path / "model.safetensors")
        assert open_checkpoint(tmp_path).config() == {}
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert open_checkpoint(tmp_path).config() == {"model_type": "llama"}
        (tmp_path / "config.json").write_text("[1]")
        with pytest.raises(CheckpointError, match=r"config\.json.*JSON object.*list"):
            open_checkpoint(tmp_path).config()


class TestContentHash:
    def test_single_file_is_the_hash_of_its_bytes(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file(weights(w=(100, 100)), path)
        expected = hashlib.sha256(path.read_bytes()).hexdigest()
        assert open_checkpoint(tmp_path).content_hash() == f"sha256:{expected}"

    def test_shards_hash_by_name_and_content_wherever_they_lie(self, tmp_path, two_shards):
        hashes = []
        for place in ("one", "two"):
            folder = tmp_path / place
            folder.mkdir()
            save_sharded(folder, two_shards)
            hashes.append(open_checkpoint(folder).content_hash())
        lines = "".join(
            f"{name}\t{hashlib.sha256((tmp_path / 'one' / name).read_bytes()).hexdigest()}\n"
            for name in sorted(two_shards)
        )
        assert hashes == [f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"] * 2

    def test_a_changed_value_changes_the_hash(self, tmp_path):
        tensors = weights(w=(4, 4))
        save_file(tensors, tmp_path / "a.safetensors")
        tensors["w"][0, 0] += 1
        save_file(tensors, tmp_path / "b.safetensors")
        first, second = (open_checkpoint(tmp_path / f"{n}.safetensors") for n in "ab")
        assert first.content_hash() != second.content_hash()


class TestUse:
    def test_a_tensor_outlives_the_file(self, tmp_path):
        tensors = weights(w=(64, 64))
        path = tmp_path / "model.safetensors"
        save_file(tensors, path)
        with open_checkpoint(path) as checkpoint:
            read = checkpoint.read("w")
        path.write_bytes(b"\0" * path.stat().st_size)
        path.unlink()
        assert torch.equal(read, tensors["w"])

    def test_reading_twice_gives_independent_tensors(self, tmp_path):
        save_file(weights(w=(4,)), tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        first = checkpoint.read("w")
        first.zero_()
        assert checkpoint.read("w").abs().sum() > 0

    @pytest.mark.parametrize("method", ["read", "shape", "dtype"])
    def test_unknown_name_tells_the_nearest(self, tmp_path, method):
        save_file(weights(layer__q_proj=(1,), layer__k_proj=(1,)), tmp_path / "model.safetensors")
        checkpoint = open_checkpoint(tmp_path)
        with pytest.raises(CheckpointError, match=r"'layer\.q_prj'.*nearest.*layer\.q_proj"):
            getattr(checkpoint, method)("layer.q_prj")
        with pytest.raises(CheckpointError, match=r"No tensor 'zzz'.*\(2 tensors\)"):
            getattr(checkpoint, method)("zzz")

    def test_reading_after_close_raises(self, tmp_path):
        save_file(weights(w=(1,)), tmp_path / "model.safetensors")
        with open_checkpoint(tmp_path) as checkpoint:
            pass
        with pytest.raises(CheckpointError, match="was closed"):
            checkpoint.read("w")

    def test_file_that_shrinks_after_opening(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file(weights(w=(64, 64)), path)
        checkpoint = open_checkpoint(path)
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="ended 8 bytes early"):
            checkpoint.read("w")


class TestBadInput:
    def test_errors_share_a_base(self):
        assert issubclass(CheckpointError, TransferError)

    @pytest.mark.parametrize(
        "spec",
        [
            "",
            "missing",
            "a/b/c",
            "./no/where",
            "org/name@",
            "x.safetensors",
            "org/x.gguf",
            "x" * 300,
        ],
        ids=lambda spec: spec[:20] or "empty",
    )
    def test_missing_path(self, tmp_path, monkeypatch, spec):
        monkeypatch.chdir(tmp_path)
        assert f"No checkpoint at '{spec}': the path does not exist" in error_of(spec)

    def test_revision_of_a_path(self, tmp_path):
        assert "which is a path" in error_of(tmp_path, revision="main")

    @pytest.mark.parametrize("keep", [0, 4, 8, 40], ids="{}-bytes".format)
    def test_cut_inside_the_header(self, tmp_path, keep):
        path = tmp_path / "model.safetensors"
        save_file(weights(w=(64, 64)), path)
        os.truncate(path, keep)
        assert re.search(r"not a safetensors file or its header is cut off", error_of(tmp_path))

    @pytest.mark.parametrize("change", [-1, 1], ids=["short", "long"])
    def test_wrong_length(self, tmp_path, change):
        path = tmp_path / "model.safetensors"
        save_file(weights(w=(64, 64)), path)
        size = path.stat().st_size
        os.truncate(path, size + change)
        message = error_of(tmp_path)
        assert f"should have {size} bytes by its header, but has {size + change}" in message

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (b"[1, 2]", "not that of a safetensors file"),
            (b"{nonsense", "not that of a safetensors file"),
            (b'{"w": {"dtype": "F32"}}', "not that of a safetensors file"),
            (b'{"w": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 4]}}', "dtype Q9"),
            (b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "8 bytes, but"),
            (b'{"w": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}}', "corrupt"),
            (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "was expected"),
        ],
        ids=["list", "no-json", "no-shape", "dtype", "size", "negative", "hole"],
    )
    def test_corrupt_header(self, tmp_path, header, reason):
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        assert reason in error_of(path)

    def test_index_names_a_missing_shard(self, tmp_path, two_shards):
        save_sharded(tmp_path, two_shards)
        (tmp_path / "model-00002-of-00002.safetensors").unlink()
        assert "names model-00002-of-00002.safetensors, which is not beside" in error_of(tmp_path)

    def test_tensor_missing_from_its_shard(self, tmp_path, two_shards):
        save_sharded(tmp_path, two_shards)
        save_file(weights(a__weight=(3, 5)), tmp_path / "model-00001-of-00002.safetensors")
        assert "'b.weight' is in 'model-00001-of-00002.safetensors'" in error_of(tmp_path)

    @pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "", 3], ids=repr)
    def test_index_leads_out_of_its_directory(self, tmp_path, shard):
        content = {"weight_map": {"w": shard}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
        assert f"puts 'w' into {shard!r}" in error_of(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [("{", "not valid JSON"), ("[]", "JSON object"), ('{"weight_map": {}}', "no weight_map")],
        ids=["no-json", "list", "empty"],
    )
    def test_broken_index(self, tmp_path, content, reason):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        assert reason in error_of(tmp_path)

    def test_several_files_without_index(self, tmp_path):
        for name in ("one.safetensors", "two.safetensors"):
            save_file(weights(w=(1,)), tmp_path / name)
        message = error_of(tmp_path)
        assert "several .safetensors files and no index: one.safetensors, two.saf" in message

    def test_empty_directory(self, tmp_path):
        assert "it holds no files" in error_of(tmp_path)

    def test_directory_of_other_things(self, tmp_path):
        (tmp_path / "tokenizer.json").write_text("{}")
        assert "it holds tokenizer.json, but no model.safetensors" in error_of(tmp_path)

    def test_directory_of_an_adapter(self, tmp_path):
        save_file(weights(w=(1,)), tmp_path / "adapter_model.safetensors")
        assert "it holds an adapter, not a base model" in error_of(tmp_path)

    def test_directory_of_a_pipeline_names_its_parts(self, tmp_path):
        (tmp_path / "unet").mkdir()
        save_file(weights(w=(1,)), tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
        (tmp_path / "model_index.json").write_text("{}")
        assert f"in its parts unet; name one, such as '{tmp_path / 'unet'}'" in error_of(tmp_path)

    @pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
    @pytest.mark.parametrize(
        "name", ["pytorch_model.bin", "x.pt", "x.ckpt", "model.safetensors", "noext"]
    )
    def test_torch_pickle_by_any_name(self, tmp_path, name, zipped):
        path = tmp_path / name
        torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=zipped)
        message = error_of(path)
        assert f"'{path}' is a pickle: pickles can run code" in message
        assert "save_pretrained(OUT)" in message

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_bare_pickle(self, tmp_path, protocol):
        path = tmp_path / "model.safetensors"
        path.write_bytes(pickle.dumps({"w": [1, 2]}, protocol=protocol))
        assert "is a pickle" in error_of(path)

    def test_directory_with_a_pickle_only(self, tmp_path):
        torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
        assert "it holds pytorch_model.bin only, and pickles can run code" in error_of(tmp_path)

    def test_pickle_as_a_shard(self, tmp_path, two_shards):
        save_sharded(tmp_path, two_shards)
        torch.save({}, tmp_path / "model-00002-of-00002.safetensors")
        assert "is a pickle" in error_of(tmp_path)

    def test_header_length_that_looks_like_a_pickle_is_none(self, tmp_path):
        # 0x0480 bytes of header: the file begins with 0x80 0x04, as a protocol 4 pickle does.
        body = json.dumps({"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
        header = body.ljust(0x0480)
        path = tmp_path / "model.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\x07")
        assert open_checkpoint(path).read("w").tolist() == [7]

    def test_git_lfs_pointer(self, tmp_path):
        (tmp_path / "model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
        )
        assert "is a Git LFS pointer" in error_of(tmp_path)

    @pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root reads everything")
    def test_unreadable_file(self, tmp_path):
        path = tmp_path / "model.safetensors"
        save_file(weights(w=(1,)), path)
        path.chmod(0)
        assert "Cannot read" in error_of(path)
