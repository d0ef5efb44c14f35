# SPDX-License-Identifier: Apache-2.0
"""The texts of the language measurement, from pinned packages to one small folder of token ids.

Tatoeba English-French and Spanish-English (PyPI nmt 0.0.6), the XSum subset and the Wikipedia
passages of BoolQ (PyPI nlptest 1.4.0rc1). Whatever the split of an English sentence is follows
from its own hash, so no test sentence is trained on, by an adapter or by a target.
"""

import hashlib
import io
import json
import random
import shutil
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lorax_transfer.demo.pairs import normalise_sentence

NMT_SHA256 = "65db964c0afd5b0dbc4baecdce736f53222f63b791958176b5771db78a005096"
NLPTEST_SHA256 = "befbdde38761218b767a7c806e5ff0ae99cbf8f22da78e8a62808f16e7db98e1"
MODEL_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

END = 2  # <|im_end|>
SPLITS = 40  # one bucket in 40 is for testing, one for choosing settings
LENGTH = {"enfr": 48, "xsum": 256}
ANSWER = {"enfr": 28, "xsum": 44}


@dataclass(frozen=True)
class Examples:
    """Prompts with answers: ragged rows of token ids, and where each answer starts."""

    tokens: list[np.ndarray]
    starts: np.ndarray

    def __len__(self):
        return len(self.tokens)

    def take(self, count):
        """The first `count`."""
        return Examples(self.tokens[:count], self.starts[:count])

    def at_most(self, length):
        """Those of at most `length` tokens."""
        kept = [i for i, row in enumerate(self.tokens) if len(row) <= length]
        return Examples([self.tokens[i] for i in kept], self.starts[kept])


def _checked(path, sha256):
    content = Path(path).read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise SystemExit(f"{path} should have SHA-256 {sha256} but has {found}: fetch it again.")
    return content


def _bucket(sentence):
    digest = hashlib.sha256(b"lm" + normalise_sentence(sentence).encode()).digest()
    return int.from_bytes(digest[:8], "big") % SPLITS


def _split(sentence):
    return {0: "test", 1: "valid"}.get(_bucket(sentence), "train")


def _pairs(archive, inner, name):
    with zipfile.ZipFile(io.BytesIO(archive.extractfile(inner).read())) as zipped:
        for line in zipped.read(name).decode().splitlines():
            english, other = line.split("\t")[:2]
            yield english, other


def _translation(pairs, encode):
    """English to French by split; of each English sentence one translation, drawn by hash."""
    chosen = {}
    for english, french in pairs:
        if 4 <= len(english.split()) <= 14:
            mark = hashlib.sha256(french.encode()).digest()
            key = normalise_sentence(english)
            if key not in chosen or mark < chosen[key][0]:
                chosen[key] = (mark, english, french)
    rows = {"train": [], "valid": [], "test": []}
    # In an order that favours no subject.
    for mark, english, french in sorted(chosen.values()):
        del mark
        prompt = encode(f"English: {english}\nFrench:")
        answer = [*encode(f" {french}"), END]
        if len(prompt) + len(answer) <= LENGTH["enfr"] and len(answer) <= ANSWER["enfr"]:
            rows[_split(english)].append((prompt, answer, french))
    return rows


def _summaries(lines, encode):
    rows = {"train": [], "valid": [], "test": []}
    for line in lines:
        item = json.loads(line)
        document = encode(item["document"].replace("\n", " "))[:196]
        prompt = [*encode("Article: "), *document, *encode("\nSummary in one sentence:")]
        answer = [*encode(f" {item['summary']}")[: ANSWER["xsum"] - 1], END]
        # Few documents: a quarter is kept for testing and choosing.
        part = int(hashlib.sha256(item["id"].encode()).hexdigest(), 16) % 20
        split = "test" if part < 4 else "valid" if part < 6 else "train"
        rows[split].append((prompt, answer, item["summary"]))
    return rows


def _passages(lines):
    seen = set()
    for line in lines:
        passage = json.loads(line)["passage"]
        if passage not in seen:
            seen.add(passage)
            yield passage


def _stream(texts, encode, limit):
    """Texts one after another with an end mark each, cut at `limit` tokens."""
    out, total = [], 0
    for text in texts:
        row = [*encode(text), END]
        out.append(np.array(row, dtype=np.uint16))
        total += len(row)
        if total >= limit:
            break
    return np.concatenate(out)[:limit]


def _pack(rows, prefix):
    whole = [p + a for p, a, _ in rows]
    return {
        f"{prefix}.tokens": np.concatenate([np.array(r, dtype=np.uint16) for r in whole]),
        f"{prefix}.lengths": np.array([len(r) for r in whole], dtype=np.uint16),
        f"{prefix}.starts": np.array([len(p) for p, _, _ in rows], dtype=np.uint16),
    }


def prepare(nmt, nlptest, gguf, folder, *, train_pairs=45000):
    """Write the folder: `data.npz`, `references.json`, `tokenizer.json`, the model in two parts."""
    from transformers import AutoTokenizer

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    gguf = Path(gguf)
    model = _checked(gguf, MODEL_SHA256)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).backend_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False).ids

    arrays, references = {}, {}
    with tarfile.open(fileobj=io.BytesIO(_checked(nmt, NMT_SHA256))) as archive:
        french = _translation(_pairs(archive, "nmt-0.0.6/data/fra-eng.zip", "fra.txt"), encode)
        spanish = [
            f"Spanish: {other}\nEnglish: {english}"
            for english, other in _pairs(archive, "nmt-0.0.6/data/spa-eng.zip", "spa.txt")
            if _split(english) == "train" and len(english.split()) >= 4
        ]
    with zipfile.ZipFile(io.BytesIO(_checked(nlptest, NLPTEST_SHA256))) as wheel:
        read = {
            name: wheel.read(f"nlptest/data/{name}").decode().splitlines()
            for name in ("Xsum/XSum-test.jsonl", "BoolQ/combined.jsonl")
        }
    summaries = _summaries(read["Xsum/XSum-test.jsonl"], encode)
    for task, rows in (("enfr", french), ("xsum", summaries)):
        limits = {"train": train_pairs, "valid": 400, "test": 400}
        for split, limit in limits.items():
            kept = rows[split][:limit]
            arrays |= _pack(kept, f"{task}.{split}")
            references[f"{task}.{split}"] = [text for _, _, text in kept]
            print(f"{task}.{split}: {len(kept)}")
    rng = random.Random(0)
    rng.shuffle(spanish)
    generic = list(_passages(read["BoolQ/combined.jsonl"]))
    rng.shuffle(generic)
    for name, texts, limit in (("spanish", spanish, 1_600_000), ("generic", generic, 1_600_000)):
        stream = _stream(texts, encode, limit)
        arrays[f"{name}.valid"], arrays[f"{name}.train"] = stream[:20_000], stream[20_000:]
        print(f"{name}: {len(stream)} tokens of {len(texts)} texts")
    np.savez_compressed(folder / "data.npz", **arrays)
    references = {name: texts for name, texts in references.items() if "train" not in name}
    (folder / "references.json").write_text(json.dumps(references, ensure_ascii=False), "utf-8")
    half = len(model) // 2
    (folder / "model.part1").write_bytes(model[:half])
    (folder / "model.part2").write_bytes(model[half:])


def join_model(folder, parts=None):
    """Path of the model in `folder`, put together from its two parts where that is still to do."""
    folder = Path(folder)
    path = folder / MODEL_FILE
    if not path.exists():
        temporary = path.with_suffix(".tmp")
        with temporary.open("wb") as out:
            for part in parts or (folder / "model.part1", folder / "model.part2"):
                with Path(part).open("rb") as source:
                    shutil.copyfileobj(source, out)
        _checked(temporary, MODEL_SHA256)
        temporary.replace(path)
    return path


class Corpus:
    """What `prepare` wrote."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self._arrays = np.load(self.folder / "data.npz")
        self.references = json.loads((self.folder / "references.json").read_text("utf-8"))
        self._streams = {}

    def examples(self, task, split):
        """Prompts with answers of a task ("enfr", "xsum") and a split."""
        prefix = f"{task}.{split}"
        ends = np.cumsum(self._arrays[f"{prefix}.lengths"].astype(np.int64))
        tokens = np.split(self._arrays[f"{prefix}.tokens"].astype(np.int64), ends[:-1])
        return Examples(tokens, self._arrays[f"{prefix}.starts"].astype(np.int64))

    def stream(self, name, split):
        """Running text ("spanish", "generic") as one row of token ids, always the same object."""
        key = f"{name}.{split}"
        if key not in self._streams:
            self._streams[key] = self._arrays[key].astype(np.int64)
        return self._streams[key]

    def decoder(self):
        """A function from token ids to text, up to the end mark."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))

        def decode(ids):
            ids = list(ids)
            if END in ids:
                ids = ids[: ids.index(END)]
            return tokenizer.decode(ids).strip()

        return decode
