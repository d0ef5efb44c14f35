# SPDX-License-Identifier: Apache-2.0
"""Two models in as few bytes as they need, in parts that are small enough to be carried one by one.

Weights are rounded to multiples of a share of their row's root mean square, and the whole numbers
are Huffman-coded (zlib, without its search for repeats). A uniform grid with such a code is within
a quarter of a bit of the best code there is for numbers from a bell curve, and needs no calibration
and no package to be read. A rounded model is a base model like any other.
"""

import json
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from .lm_model import EMBEDDING, HEAD, Shape

INDEX = "index.json"
PART_BYTES = 58_000_000


def encode(matrix, step):
    """Bytes of a matrix, and the row scales; `step` is a share of a row's root mean square."""
    scale = step * matrix.float().square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    scale = scale.half().float().clamp(min=6e-8)
    whole = (matrix.float() / scale).round_().clamp_(-127, 127).to(torch.int8)
    coder = zlib.compressobj(6, zlib.DEFLATED, -15, 9, zlib.Z_HUFFMAN_ONLY)
    return coder.compress(whole.numpy().tobytes()) + coder.flush(), scale.half().squeeze(1)


def decode(content, scale, shape, device):
    """The rounded matrix, float32."""
    # A bytearray, because torch wants memory that may be written to.
    whole = np.frombuffer(bytearray(zlib.decompress(content, -15)), dtype=np.int8)
    return (
        torch.from_numpy(whole).view(*shape).to(device).float() * scale.to(device).float()[:, None]
    )


class Writer:
    """Writes tensors one after another into numbered folders of at most a part's size.

    Args:
        folder: gets `00/`, `01/`, ...; the index goes to the first.
        part_bytes: the most that a part's file may hold.
    """

    def __init__(self, folder, part_bytes=PART_BYTES):
        self._folder, self._most = Path(folder), part_bytes
        self._entries, self._shapes, self._sizes = [], {}, []

    def _place(self, content):
        """Append to the first part that has room; returns which, and where."""
        fits = (p for p, size in enumerate(self._sizes) if size + len(content) <= self._most)
        part = next(fits, len(self._sizes))
        if part == len(self._sizes):
            self._sizes.append(0)
            (self._folder / f"{part:02d}").mkdir(parents=True, exist_ok=True)
        with self._path(part).open("ab" if self._sizes[part] else "wb") as file:
            file.write(content)
        self._sizes[part] += len(content)
        return part, self._sizes[part] - len(content)

    def _path(self, part):
        return self._folder / f"{part:02d}" / f"weights.{part:02d}"

    def model(self, label, shape, names, read, steps):
        """Add a model: `read(name)` gives a tensor, `steps(name)` its step.

        Vectors are kept in float32. Returns the relative error of the matrices by name.
        """
        self._shapes[label] = asdict(shape)
        errors = {}
        for name in names:
            value = read(name)
            entry = {"model": label, "name": name, "shape": list(value.shape)}
            if value.dim() == 1:
                content = value.float().numpy().tobytes()
            else:
                content, scale = encode(value, steps(name))
                rounded = decode(content, scale, value.shape, "cpu")
                errors[name] = float((rounded - value).norm() / value.norm())
                content = scale.numpy().tobytes() + content
            part, at = self._place(content)
            entry |= {"part": part, "at": at, "bytes": len(content)}
            self._entries.append(entry)
        return errors

    def close(self, **facts):
        """Write the index; returns the number of parts."""
        index = {"shapes": self._shapes, "tensors": self._entries} | facts
        (self._folder / "00" / INDEX).write_text(json.dumps(index))
        return len(self._sizes)


def load(folder, device, threads=8):
    """Label -> (shape, float32 weights on the device), from a folder with all parts' files."""
    folder = Path(folder)
    index = json.loads((folder / INDEX).read_text())
    parts = sorted({entry["part"] for entry in index["tensors"]})
    missing = [p for p in parts if not (folder / f"weights.{p:02d}").exists()]
    if missing:
        raise SystemExit(f"{folder} lacks weights.{missing[0]:02d}: copy every part's files there.")
    maps = {p: np.memmap(folder / f"weights.{p:02d}", dtype=np.uint8, mode="r") for p in parts}

    def read(entry):
        content = maps[entry["part"]][entry["at"] : entry["at"] + entry["bytes"]].tobytes()
        shape = entry["shape"]
        if len(shape) == 1:
            return torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.float32)).to(device)
        scale = torch.from_numpy(
            np.frombuffer(bytearray(content[: 2 * shape[0]]), dtype=np.float16)
        )
        return decode(content[2 * shape[0] :], scale, shape, device)

    with ThreadPoolExecutor(threads) as pool:
        tensors = list(pool.map(read, index["tensors"]))
    out = {label: (Shape(**shape), {}) for label, shape in index["shapes"].items()}
    for entry, tensor in zip(index["tensors"], tensors, strict=True):
        out[entry["model"]][1][entry["name"]] = tensor
    return out


def is_table(name):
    """Whether a tensor has a row for every token."""
    return name in (EMBEDDING, HEAD)
