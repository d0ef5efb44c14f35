# SPDX-License-Identifier: Apache-2.0
"""Reading a checkpoint takes the memory of a tensor, not that of the file."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/self/status")

# The high-water mark of a process of its own, against what was resident when reading began.
# (ru_maxrss will not do: a child begins with its parent's.)
SCRIPT = """
    import sys
    from lorax_transfer.checkpoints import open_checkpoint

    def mib(key):
        with open("/proc/self/status") as status:
            [line] = [line for line in status if line.startswith(key)]
        return int(line.split()[1]) / 1024

    with open_checkpoint(sys.argv[1]) as checkpoint:
        checkpoint.read(sys.argv[2])
        before = mib("VmRSS")
        for name in checkpoint.names():
            # A mapped tensor takes memory only once it is looked at.
            checkpoint.read(name).max()
        print(mib("VmHWM") - before)
"""


def growth(folder, warm_up):
    output = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), warm_up],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    return float(output.stdout)


def test_shards_are_read_a_tensor_at_a_time(tmp_path):
    tensor = torch.ones(2 << 20)
    weight_map = {}
    for shard in range(4):
        tensors = {f"t{shard}{i}": tensor.clone() for i in range(4)}
        if shard == 0:
            tensors["small"] = torch.ones(1)
        save_file(tensors, tmp_path / f"model-{shard}.safetensors")
        weight_map.update(dict.fromkeys(tensors, f"model-{shard}.safetensors"))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    # Tensors of 8 MiB, shards of 32, 128 in all: below 24, no shard was ever held whole.
    assert 7 < growth(tmp_path, "small") < 24


def test_gguf_tensor_is_expanded_by_pieces(tmp_path):
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q8_0
    blocks = np.ones((4096, 4096 // 32 * 34), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_head_count(32)
    writer.add_tensor("blk.0.attn_q.weight", blocks, raw_dtype=kind)
    writer.add_tensor("output_norm.weight", blocks[0, :34].copy(), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # 64 MiB expanded; expanding all at once, or restoring q's row order out of place, takes 128.
    assert 63 < growth(tmp_path, "model.norm.weight") < 112
