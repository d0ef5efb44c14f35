# SPDX-License-Identifier: Apache-2.0
"""What `resize` and `merge` share: cut the layers, measure the result, write it, report."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import lorax_kernels as lk

from ._cut import Cut, Dtypes, error
from ._recompression import Part, Recompression, sizes
from .adapters import Adapter, LoraLayer, write_adapter
from .atomic import atomic_file
from .errors import OutputError
from .preflight import PathLike, check_file, check_output
from .tables import common_prefix


def finish(
    adapter: Adapter,
    exact: Sequence[tuple[LoraLayer, Dtypes]],
    cut: Cut,
    *,
    kind: str,
    inputs: tuple[Part, ...],
    settings: Mapping[str, Any],
    output: PathLike | None,
    overwrite: bool,
    report: PathLike | None,
    progress: Callable[[str, int, int], None] | None,
    command: str | None,
    warnings: Sequence[str],
    started: float,
    parameters_before: int,
) -> Recompression:
    """Cut the layers, measure the error of what will be written, write it, and report.

    Args:
        adapter: whose configuration the result gets.
        exact: the layers before the cut, each with the dtypes of B and A that "auto" means for it.
        cut: where, and how the result is written.
        kind: "resize" or "merge".
        inputs: the adapters that went in.
        settings: options besides those of the cut, for the report.
        output: directory to write, None for a dry run.
        overwrite: replace an existing adapter.
        report: .json file, or None.
        progress: called as `progress(stage, done, total)`.
        command: command line, or None.
        warnings: sentences for the report.
        started: reading of `time.perf_counter` at the start.
        parameters_before: numbers in the factors that went in.

    Returns:
        The report.
    """
    layers, records = [], []
    for i, (before, dtypes) in enumerate(exact):
        if progress is not None:
            progress("layers", i, len(exact))
        smaller, record = cut.apply(before)
        layers.append(cut.written(smaller, dtypes))
        records.append(dataclasses.replace(record, error=error(before, layers[-1])))
    if progress is not None:
        progress("layers", len(exact), len(exact))
    if not cut.is_exact and all(record.rank == record.rank_before for record in records):
        largest = max(record.rank for record in records)
        found = f"nothing was cut: no layer has more directions (at most {largest})."
        warnings = [*warnings, found]
    done = Recompression(
        kind=kind,
        version=lk.__version__,
        command=command,
        inputs=inputs,
        settings={"rank": cut.rank, "energy": cut.energy, "dtype": cut.dtype, **settings},
        layers=tuple(records),
        totals=sizes(records, layers, parameters_before),
        warnings=tuple(warnings),
        seconds=0.0,
        output=None if output is None else str(output),
    )
    if output is not None:
        write_adapter(
            adapter.with_layers(layers),
            Path(output),
            base_model_name_or_path=adapter.base_model or "",
            provenance=_provenance(done),
            model_card=_card(done, adapter.base_model),
            overwrite=overwrite,
        )
    done = dataclasses.replace(done, seconds=time.perf_counter() - started)
    if report is not None:
        with atomic_file(report) as temporary:
            temporary.write_text(done.to_json(), encoding="utf-8")
    return done


def check_places(
    output: PathLike | None, overwrite: bool, report: PathLike | None, dry_run: bool
) -> None:
    """Find out before the work that an output is missing or cannot be written."""
    if output is None and not dry_run:
        raise OutputError("no output was given, expected a directory to write (--output).")
    if output is not None and not dry_run:
        check_output(Path(output), overwrite)
    check_file(report, ".json", "report")


def _provenance(done: Recompression) -> dict[str, str]:
    facts: dict[str, object] = {"method": done.kind, "version": done.version}
    facts |= {key: done.settings[key] for key in ("rank", "energy")}
    for i, part in enumerate(done.inputs):
        facts[f"adapter_{i}"] = part.location
        facts[f"adapter_{i}_hash"] = part.content_hash
        facts[f"adapter_{i}_weight"] = part.weight
    facts["command"] = done.command
    return {key: str(value) for key, value in facts.items() if value is not None}


def _card(done: Recompression, base_model: str | None) -> str:
    """README.md of the result."""
    did = "cut to fewer directions" if done.kind == "resize" else "added up, with weights"
    base = json.dumps(base_model or "", ensure_ascii=False)
    rows = [f"| {part.weight:g} | `{part.location}` |" for part in done.inputs]
    command = ["", "```shell", done.command, "```"] if done.command else []
    return "\n".join(
        [
            "---",
            *([f"base_model: {base}"] if base_model else []),
            "library_name: peft",
            "tags:",
            "- lora",
            "- lorax-transfer",
            "---",
            "",
            f"# LoRA adapters {did}" if done.kind == "merge" else f"# A LoRA adapter {did}",
            "",
            "| weight | adapter |",
            "|---|---|",
            *rows,
            *command,
            "",
            *_sentences(done),
            "",
            f"Made with lorax-transfer {done.version}.",
            "",
        ]
    )


def _sentences(done: Recompression) -> list[str]:
    totals = done.totals
    lines = [f"{totals.parameters:,} parameters, before {totals.parameters_before:,}."]
    if totals.energy_kept is not None:
        lines.append(
            f"Energy kept: {totals.energy_kept:.3%}; relative error {totals.error:.1e}; largest "
            f"spectral error of a layer {totals.spectral_error:.1e}."
        )
    return lines


def show(done: Recompression, console: Console) -> None:
    """Print a report as a table.

    Args:
        done: what to print.
        console: where to.
    """
    for part in done.inputs:
        text = Text(f"{part.weight:>8g}  " if done.kind == "merge" else " adapter  ", style="dim")
        console.print(text.append(part.location, style="default"), soft_wrap=True, highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    prefix = common_prefix([x.module for x in done.layers])
    longest = min(40, max(len(x.module) - len(prefix) for x in done.layers))
    table.add_column(f"{prefix}*" if prefix else "module", overflow="fold", min_width=longest)
    for heading in ("r before", "r", "kept", "spectral err", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    has_notes = any(x.reason for x in done.layers)
    if has_notes:
        table.add_column("note", overflow="fold")
    for x in done.layers:
        table.add_row(
            x.module.removeprefix(prefix),
            str(x.rank_before),
            str(x.rank),
            "-" if x.energy_kept is None else f"{x.energy_kept:.3%}",
            "-" if x.spectral_error is None else f"{x.spectral_error:.1e}",
            "-" if x.error is None else f"{x.error:.1e}",
            *([x.reason] if has_notes else []),
        )
    console.print(table)
    for line in ("", *_sentences(done), *(f"warning: {x}" for x in done.warnings)):
        console.print(line, highlight=False)
    if done.output is not None:
        wrote = f"Wrote {done.totals.layers} layers to {done.output} in {done.seconds:.1f} s."
        console.print(wrote, highlight=False, soft_wrap=True)
