# SPDX-License-Identifier: Apache-2.0
"""Pairs that no rule of `lorax-transfer scan` was made from: does it name the best method there?

    python benchmarks/transfer/held_out.py --data lm-data --output scan_held_out_cpu.json

The source, the adapter and the task are the demo's. The targets are the source with all weights
trained on, to find the summary that belongs to an article among those of a batch (the articles and
summaries of `benchmarks/quality/language.py prepare`); that is their own skill, scored on others.
Takes some minutes on two cores.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lorax_transfer
from benchmarks.quality.lm_data import Corpus
from benchmarks.record import save
from lorax_transfer.demo.models import SOURCE, adapter_directory, model_directory
from lorax_transfer.demo.pairs import evaluation_pairs
from lorax_transfer.demo.task import load_encoder

# Steps of training, and their rate.
TARGETS = {"near": (20, 5e-5), "far": (60, 2e-4)}
BATCH, TEMPERATURE = 16, 0.05
# Projections were behind copying wherever they were measured, and transport level with it.
JOBS = [
    ("copy", {}),
    ("copy", {"embeddings": 0.5}),
    ("copy", {"embeddings": 1.0}),
    ("anchor", {}),
    ("anchor", {"embeddings": 1.0}),
    ("restore", {}),
    ("restore", {"embeddings": 1.0}),
    ("restore", {"strength": 1.0}),
    ("restore", {"strength": 1.0, "embeddings": 1.0}),
]


def articles(folder, split):
    """Articles and their summaries, as text."""
    corpus = Corpus(folder)
    decode, examples = corpus.decoder(), corpus.examples("xsum", split)
    return [
        (decode(tokens[:start]), decode(tokens[start:]))
        for tokens, start in zip(examples.tokens, examples.starts, strict=True)
    ]


def train(pairs, steps, rate):
    """The source, with all weights trained on to bring articles and their summaries together."""
    torch.manual_seed(0)
    encoder = load_encoder(model_directory(SOURCE))
    encoder.model.train()
    optimizer = torch.optim.AdamW(encoder.model.parameters(), lr=rate, weight_decay=0)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10, (steps - step) / (steps / 4))
        rows = torch.randperm(len(pairs), generator=order)[:BATCH].tolist()
        sides = zip(*(pairs[i] for i in rows), strict=True)
        documents, summaries = (encoder.embed_tokens(encoder.tokenize(side)) for side in sides)
        logits = documents @ summaries.T / TEMPERATURE
        own = torch.arange(len(rows))
        loss = sum(torch.nn.functional.cross_entropy(x, own) for x in (logits, logits.T)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    encoder.model.eval()
    return encoder


def reciprocal_ranks(encoder, pairs):
    """Of every sentence's own partner, both ways."""
    one, other = (encoder.embed(side) for side in zip(*pairs, strict=True))
    cosines = one @ other.T
    own = cosines.diagonal()
    ranks = [(cosines >= own[:, None]).sum(1), (cosines >= own[None]).sum(0)]
    return 1 / torch.stack(ranks).double()


def measured(folder):
    """A row for each target: the verdict, and every method's scores."""
    training, test = (articles(folder, split) for split in ("train", "test"))
    pairs = [(pair.english, pair.french) for pair in evaluation_pairs()]
    source, adapter = model_directory(SOURCE), adapter_directory(SOURCE)
    for name, (steps, rate) in TARGETS.items():
        with tempfile.TemporaryDirectory() as scratch:
            target = Path(scratch) / "target"
            trained = train(training, steps, rate)
            trained.model.save_pretrained(target)
            trained.tokenizer.save_pretrained(target)
            report = lorax_transfer.scan(adapter, source, target)
            totals = report.totals
            facts = {
                "target": name,
                "verdict": report.recommendation.verdict,
                "reason": report.recommendation.reason,
                "drift": totals.drift,
                "embedding_drift": totals.embedding_drift,
                "untouched_drift": totals.untouched_drift,
            }
            print(facts, flush=True)
            rows, ranks = [], {}
            for method, options in [("none", {}), *JOBS]:
                label = " ".join([method, *(f"--{k} {v:g}" for k, v in options.items())])
                output = Path(scratch) / label
                if method == "none":
                    encoder = trained
                else:
                    lorax_transfer.transfer(
                        adapter, source, target, output, method=method, **options
                    )
                    encoder = load_encoder(target, output)
                ranks[label] = reciprocal_ranks(encoder, pairs)
                skill = reciprocal_ranks(encoder, test)
                rows.append(
                    {
                        "method": label,
                        "mrr": ranks[label].mean().item(),
                        "hits": (ranks[label] == 1).double().mean().item(),
                        "own_skill_mrr": skill.mean().item(),
                    }
                )
                print(rows[-1], flush=True)
            best = max(rows, key=lambda row: row["mrr"])["method"]
            for row in rows:
                # Pairs are scored both ways, which are not independent.
                behind = (ranks[best] - ranks[row["method"]]).mean(0)
                row["behind"] = behind.mean().item()
                row["standard_error"] = (behind.std() / len(behind) ** 0.5).item()
            yield facts | {"steps": steps, "rate": rate, "methods": rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", default="scan_held_out_cpu.json")
    arguments = parser.parse_args()
    rows = []
    for found in measured(arguments.data):
        rows.append(found)
        save(arguments.output, rows)


if __name__ == "__main__":
    main()
