# SPDX-License-Identifier: Apache-2.0
"""Run the demo: move the source's adapter to the target by every method and score them all."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lorax_transfer
from lorax_transfer.atomic import atomic_file
from lorax_transfer.demo.models import SOURCE, TARGET, adapter_directory, model_directory
from lorax_transfer.demo.pairs import SentencePair, evaluation_pairs
from lorax_transfer.demo.task import Retrieval, load_encoder, score_encoder
from lorax_transfer.errors import OutputError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SCORES_FILE = "scores.json"

# A narrow and a wide cut of matrices whose smaller side is 384; 320 is the rank LoRA-X was
# published with.
RANKS = (64, 320)
# Methods that no rank of a basis cuts.
UNCUT = ("copy", "anchor", "restore")


@dataclass(frozen=True)
class DemoRow:
    """One scored combination of a model and an adapter.

    Attributes:
        model: Name of the model that was run.
        adapter: What was loaded on it: "none", "own" (trained on this model) or "transferred".
        method: How the adapter was transferred, "copy" for instance; None if it was not.
        rank: Singular directions kept per layer; None where the method keeps none.
        scores: What was measured.
        transfer_seconds: Wall time of the transfer alone; 0 without one.
        adapter_path: Folder of the adapter; None where there is none.
    """

    model: str
    adapter: str
    method: str | None
    rank: int | None
    scores: Retrieval
    transfer_seconds: float
    adapter_path: Path | None

    @property
    def label(self) -> str:
        """The adapter in words: "no adapter", "trained on this model", "lorax, rank 64"."""
        if self.method is None:
            return {"none": "no adapter", "own": "trained on this model"}[self.adapter]
        return self.method if self.rank is None else f"{self.method}, rank {self.rank}"


def run_demo(
    output_dir: Path | str,
    *,
    ranks: Sequence[int] = RANKS,
    methods: Sequence[str] = ("lorax", "prolora"),
    pairs: Sequence[SentencePair] | None = None,
    overwrite: bool = False,
    transfer: Callable[..., Any] | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> list[DemoRow]:
    """Transfer the demo's adapter by every method and rank, and score the lot.

    Args:
        output_dir: Where the transferred adapters (a folder each) and scores.json appear.
        ranks: Ranks to run each of `methods` at, each from 1 to 384.
        methods: Methods that cut at a rank; those of `UNCUT` always run beside them.
        pairs: Sentence pairs to score on; by default those that ship with the demo.
        overwrite: Replace what an earlier run left in `output_dir`.
        transfer: Called as `transfer(adapter, source, target, output=..., method=..., rank=...,
            overwrite=...)`; by default `lorax_transfer.transfer`.
        progress: Called with a few words before each step.

    Returns:
        Rows in the order to show: the source without and with its adapter, then the target with no
        adapter, the copied one, each transferred one, and the one trained on it.

    Raises:
        CheckpointError: A model's package is missing or altered.
        OutputError: An output exists and `overwrite` is false.

    Example:
        >>> rows = run_demo("demo-output", ranks=[64])  # doctest: +SKIP
        >>> [row.label for row in rows[2:]]  # doctest: +SKIP
        ['no adapter', 'copy', 'anchor', 'restore', 'lorax, rank 64', 'prolora, rank 64', ...]
    """
    output_dir = Path(output_dir)
    # The models come first: without them nothing here can run, and this says what to install.
    source, target = model_directory(SOURCE), model_directory(TARGET)
    jobs: list[tuple[str, int | None]] = [(method, None) for method in UNCUT]
    jobs += [(method, rank) for method in methods for rank in ranks]
    outputs = [output_dir / (m if k is None else f"{m}-{k}") for m, k in jobs]
    _check_outputs([*outputs, output_dir / SCORES_FILE], overwrite)

    transfer = transfer or lorax_transfer.transfer
    chosen = evaluation_pairs() if pairs is None else list(pairs)
    own = adapter_directory(SOURCE)

    def row(
        model: Path,
        adapter: Path | None,
        kind: str,
        method: str | None = None,
        rank: int | None = None,
        seconds: float = 0.0,
    ) -> DemoRow:
        name = SOURCE.name if model == source else TARGET.name
        progress(f"scoring {name}: {kind if method is None else method}")
        scores = score_encoder(load_encoder(model, adapter), chosen)
        return DemoRow(name, kind, method, rank, scores, seconds, adapter)

    rows = [row(source, None, "none"), row(source, own, "own"), row(target, None, "none")]
    for (method, rank), output in zip(jobs, outputs, strict=True):
        progress(f"transferring: {method}" + ("" if rank is None else f", rank {rank}"))
        started = time.perf_counter()
        transfer(own, source, target, output=output, method=method, rank=rank, overwrite=overwrite)
        seconds = time.perf_counter() - started
        rows.append(row(target, output, "transferred", method, rank, seconds))
    rows.append(row(target, adapter_directory(TARGET), "own"))

    with atomic_file(output_dir / SCORES_FILE) as temporary:
        temporary.write_text(json.dumps([_as_json(r) for r in rows], indent=2) + "\n", "utf-8")
    return rows


def lift_kept(row: DemoRow, rows: Sequence[DemoRow]) -> float | None:
    """Place a row between its model without an adapter (0) and with its own adapter (1).

    Args:
        row: One of `rows`.
        rows: All rows of a run.

    Returns:
        (accuracy - none) / (own - none), which may leave the range 0 to 1; None when training
        lifted nothing, so that there is no scale.
    """
    bounds = {r.adapter: r.scores.accuracy for r in rows if r.model == row.model}
    lift = bounds["own"] - bounds["none"]
    return (row.scores.accuracy - bounds["none"]) / lift if lift > 0 else None


def demo_table(rows: Sequence[DemoRow]) -> Table:
    """Lay the rows out as a rich table.

    Args:
        rows: What `run_demo` returned.

    Returns:
        A table with one line per row and a rule between the two models.
    """
    from rich.table import Table

    table = Table(
        title="Finding a sentence's translation, English-French",
        caption=f"{rows[0].scores.pairs} held-out pairs; accuracy is that of the first hit. "
        "Lift kept: 0 % is the model without an adapter, 100 % with one trained on it.",
    )
    table.add_column("model")
    table.add_column("adapter")
    for heading in ("en to fr", "fr to en", "MRR", "lift kept", "transfer"):
        table.add_column(heading, justify="right")
    for at, row in enumerate(rows):
        kept = lift_kept(row, rows)
        table.add_row(
            row.model,
            row.label,
            f"{row.scores.english_to_french:.1%}",
            f"{row.scores.french_to_english:.1%}",
            f"{row.scores.mean_reciprocal_rank:.3f}",
            "-" if kept is None else f"{kept:.0%}",
            f"{row.transfer_seconds:.1f} s" if row.method else "",
            end_section=at + 1 < len(rows) and rows[at + 1].model != row.model,
        )
    return table


def show_demo(
    output_dir: Path | str, *, overwrite: bool = False, console: Console | None = None
) -> list[DemoRow]:
    """Run the demo for a person: steps as they pass, the table, and where the files are.

    Args:
        output_dir: As for `run_demo`.
        overwrite: As for `run_demo`.
        console: Where to print; a new console on standard output by default.

    Returns:
        The rows of `run_demo`.

    Raises:
        TransferError: As `run_demo` does.
    """
    from rich.console import Console

    console = console or Console()
    with console.status("looking for the models") as status:
        rows = run_demo(output_dir, overwrite=overwrite, progress=status.update)
    console.print(demo_table(rows))
    console.print(f"Adapters and {SCORES_FILE} are in {Path(output_dir).resolve()}")
    return rows


def _check_outputs(outputs: Sequence[Path], overwrite: bool) -> None:
    existing = [path for path in outputs if path.exists()]
    if existing and not overwrite:
        raise OutputError(
            f"{existing[0]} is there already: choose another output folder or ask to overwrite."
        )


def _as_json(row: DemoRow) -> dict[str, Any]:
    fields = dataclasses.asdict(row)
    fields["adapter_path"] = None if row.adapter_path is None else str(row.adapter_path)
    return fields
