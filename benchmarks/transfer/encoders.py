# SPDX-License-Identifier: Apache-2.0
"""Every method on real published relatives: a fine-tune of MiniLM, or a model of twice its depth.

    python benchmarks/transfer/encoders.py --output benchmarks/results/methods_finetune_cpu.json
    python benchmarks/transfer/encoders.py --deeper gte-small \
        --output benchmarks/results/methods_deeper_cpu.json

The adapter and its task are the demo's: find the French translation of an English sentence. The
fine-tune's own skill is sampled as well, on 40 pairs of a term and its meaning from the domain it
was trained on: what a method undoes of the target's training shows there. `--deeper` is a directory
with gte-small (huggingface.co/thenlper/gte-small), whose layers 0, 2, ..., 10 and MiniLM's six come
from one ancestor. Rows are saved as they come.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import lorax_transfer
from benchmarks.record import save
from lorax_transfer.demo.models import SOURCE, TARGET, adapter_directory, model_directory
from lorax_transfer.demo.pairs import evaluation_pairs
from lorax_transfer.demo.task import load_encoder, score_encoder

JOBS = [
    ("copy", {}),
    ("lorax", {"rank": 64}),
    ("lorax", {"rank": 320}),
    ("prolora", {"rank": 64}),
    ("prolora", {"rank": 320}),
    ("transport", {"rank": 64}),
    ("transport", {"rank": 320}),
    ("anchor", {"strength": 0.5}),
    ("anchor", {}),
    ("restore", {}),
    ("restore", {"directions": 1, "strength": 1.0}),
    ("restore", {"directions": 2, "strength": 1.0}),
    ("restore", {"directions": 4, "strength": 1.0}),
    ("restore", {"directions": 8, "strength": 1.0}),
    ("restore", {"directions": 16, "strength": 1.0}),
    ("restore", {"directions": 384, "strength": 1.0}),
]
DEEPER_JOBS: list[tuple[str, dict]] = [("copy", {}), ("aligned", {})]

# Written for this measurement; the fine-tune's training pairs are of this kind.
OPERATIONS = [
    ("MySQL disk full", "InnoDB tablespace or data directory out of disk space"),
    ("heap dump", "snapshot of jvm heap memory for memory leak analysis"),
    ("bulkhead pattern", "isolate failures by partitioning resources"),
    ("Init:CrashLoopBackOff", "pod init container keeps crashing before main container starts"),
    ("pod anti-affinity", "rule to prevent multiple pods from scheduling on the same node"),
    ("Kafka partition", "ordered log unit within a topic for parallel processing"),
    ("span tags", "key-value attributes describing a single span"),
    ("PV", "actual storage resource provisioned in the cluster"),
    ("self-healing", "system detects and recovers from failures automatically"),
    ("PDB", "ensures minimum available replicas during disruptions"),
    ("remediation automation", "fixing known failure patterns without human intervention"),
    ("buffer pool hit ratio", "percentage of reads served from InnoDB cache"),
    ("MTTR", "mean time to recover"),
    ("OOMKilled", "container killed because it exceeded its memory limit"),
    ("ImagePullBackOff", "image could not be pulled from the registry"),
    ("burn rate", "share of the error budget consumed per hour"),
    ("SLO", "agreed target for availability of a service"),
    ("Kafka consumer lag", "consumer is far behind the newest message"),
    ("canary deployment", "release to a small share of users first"),
    ("blue-green deployment", "switch all traffic between two identical environments"),
    ("replication lag", "replica does not keep up with the primary"),
    ("HTTP 429", "too many requests, client is throttled"),
    ("503 service unavailable", "upstream is down or overloaded, cannot serve requests"),
    ("504 gateway timeout", "gateway got no answer from the backend in time"),
    ("Pending FailedScheduling", "pod cannot be placed because no node has enough resources"),
    ("Evicted", "pod removed because the node is short of resources"),
    ("distributed tracing", "follow one request across many services"),
    ("postmortem", "document written after an incident without blame"),
    ("on-call engineer", "person who answers the pager this week"),
    ("CMDB", "database of configuration items and their relations"),
    ("circuit breaker", "stop calling a failing dependency for a while"),
    ("garbage collection pause", "java process pauses while memory is freed"),
    ("deadlock", "two transactions wait for each other's locks"),
    ("slow query log", "query takes longer than the threshold"),
    ("Kubernetes Secret", "secret values stored for pods"),
    ("Kubernetes Job", "run once to completion in the cluster"),
    ("HorizontalPodAutoscaler", "scale replicas with cpu usage"),
    ("JWT", "token that proves the identity of the caller"),
    ("TLS certificate expired", "certificate is no longer valid"),
    ("Terraform", "infrastructure described in code files"),
]


def operations(encoder):
    """Mean cosine of a term and its meaning, which the fine-tune raised, and first hits."""
    terms, meanings = (encoder.embed(side) for side in zip(*OPERATIONS, strict=True))
    cosines = terms @ meanings.T
    own = torch.arange(len(OPERATIONS))
    hits = [(cosines.argmax(side) == own).float().mean() for side in (0, 1)]
    return float(cosines.diag().mean()), float(sum(hits) / 2)


def row(model, directory, adapter, label, pairs, **more):
    encoder = load_encoder(directory, adapter)
    scores = score_encoder(encoder, pairs)
    cosine, hits = operations(encoder)
    found = {
        "model": model,
        "adapter": label,
        "english_to_french": scores.english_to_french,
        "french_to_english": scores.french_to_english,
        "mrr": scores.mean_reciprocal_rank,
        "operations_cosine": cosine,
        "operations_hits": hits,
        **more,
    }
    print({k: round(v, 3) if isinstance(v, float) else v for k, v in found.items()}, flush=True)
    return found


def transferred(model, directory, jobs, pairs):
    """A row for each method that moves the adapter from the source to `directory`."""
    source, adapter = model_directory(SOURCE), adapter_directory(SOURCE)
    for method, options in jobs:
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "moved"
            started = time.perf_counter()
            report = lorax_transfer.transfer(
                adapter, source, directory, output, method=method, **options
            )
            seconds = time.perf_counter() - started
            outcome = report.totals.methods[method]
            label = " ".join([method, *(f"{k}={v}" for k, v in options.items())])
            more = {"rank": outcome.rank, "drift_undone": outcome.drift_undone}
            yield row(model, directory, output, label, pairs, **more, seconds=seconds)


def measured(deeper, pairs):
    source, target = model_directory(SOURCE), model_directory(TARGET)
    if deeper is not None:
        yield row("deeper", deeper, None, "none", pairs)
        yield from transferred("deeper", deeper, DEEPER_JOBS, pairs)
        return
    yield row("source", source, None, "none", pairs)
    yield row("source", source, adapter_directory(SOURCE), "trained on it", pairs)
    yield row("fine-tune", target, None, "none", pairs)
    yield row("fine-tune", target, adapter_directory(TARGET), "trained on it", pairs)
    yield from transferred("fine-tune", target, JOBS, pairs)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default="methods_encoders.json")
    parser.add_argument("--deeper", type=Path, default=None)
    arguments = parser.parse_args()
    rows = []
    for found in measured(arguments.deeper, evaluation_pairs()):
        rows.append(found)
        save(arguments.output, rows)


if __name__ == "__main__":
    main()
