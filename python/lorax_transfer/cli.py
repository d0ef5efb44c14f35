# SPDX-License-Identifier: Apache-2.0
"""The command line: options in, the calls of `lorax_transfer`, tables out."""

import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version as package_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ._adapter_commands import add_commands, needs_output
from ._options import (
    WHERE,
    Adapter,
    Backend,
    Cache,
    Device,
    Directions,
    Drop,
    Dtype,
    Embeddings,
    Energy,
    Exclude,
    Form,
    Include,
    Json,
    Method,
    MinSimilarity,
    Output,
    Overwrite,
    Plot,
    Quiet,
    Rank,
    ReportFile,
    Source,
    Strength,
    Target,
    Verbose,
)
from .errors import TransferError
from .settings import DEFAULT_DIRECTIONS

if TYPE_CHECKING:
    from .report import Report

app = typer.Typer(
    name="lorax-transfer",
    help="Move a LoRA adapter from one base model to another, without training or data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point of `lorax-transfer`."""
    app()


def _print_version(is_asked: bool) -> None:
    if is_asked:
        typer.echo(f"lorax-transfer {package_version('lorax-kernels')}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def transfer(
    adapter: Adapter,
    source: Source,
    target: Target,
    output: Output = None,
    method: Method = "lorax",
    rank: Rank = None,
    energy: Energy = None,
    strength: Strength = None,
    directions: Directions = DEFAULT_DIRECTIONS,
    embeddings: Embeddings = 0.0,
    min_similarity: MinSimilarity = None,
    include: Include = None,
    exclude: Exclude = None,
    drop: Drop = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    backend: Backend = "auto",
    form: Form = "auto",
    cache: Cache = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be done to each layer; read no weights, write nothing.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Fail, and write no adapter, if a layer is below --min-similarity, changes shape, "
            "or has a basis above its tolerance.",
            rich_help_panel=WHERE,
        ),
    ] = False,
    overwrite: Overwrite = False,
    report: ReportFile = None,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Move ADAPTER to another base model and write it to --output."""
    needs_output(output, dry_run)
    with _session(verbose, quiet, as_json) as progress:
        from ._api import transfer as run

        done = run(
            adapter,
            source,
            target,
            output,
            method=method,
            rank=rank,
            energy=energy,
            strength=strength,
            directions=directions,
            embeddings=embeddings,
            min_similarity=min_similarity,
            include=include,
            exclude=exclude,
            drop=drop or (),
            dtype=dtype,
            device=device,
            backend=backend,
            form=form,
            dry_run=dry_run,
            strict=strict,
            overwrite=overwrite,
            report=report,
            plot=plot,
            cache=cache,
            progress=progress,
            command=_command_line(),
        )
    _print_report(done, as_json, quiet)


@app.command()
def scan(
    adapter: Adapter,
    source: Source,
    target: Target,
    method: Method = "lorax",
    rank: Rank = None,
    energy: Energy = None,
    strength: Strength = None,
    directions: Directions = DEFAULT_DIRECTIONS,
    min_similarity: MinSimilarity = None,
    include: Include = None,
    exclude: Exclude = None,
    drop: Drop = None,
    device: Device = "auto",
    backend: Backend = "auto",
    cache: Cache = None,
    report: ReportFile = None,
    plot: Plot = None,
    as_json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> None:
    """Measure what moving ADAPTER would do and recommend a method, or none.

    All methods are measured; --method says which one the table shows layer by layer. No adapter is
    written.
    """
    with _session(verbose, quiet, as_json) as progress:
        from ._api import scan as run

        done = run(
            adapter,
            source,
            target,
            method=method,
            rank=rank,
            energy=energy,
            strength=strength,
            directions=directions,
            min_similarity=min_similarity,
            include=include,
            exclude=exclude,
            drop=drop or (),
            device=device,
            backend=backend,
            report=report,
            plot=plot,
            cache=cache,
            progress=progress,
            command=_command_line(),
        )
    _print_report(done, as_json, quiet)


@app.command()
def info(as_json: Json = False) -> None:
    """Show versions, devices and backends, and why something is missing."""
    from .info import info as gather
    from .tables import show_info

    facts = gather()
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
    else:
        show_info(facts, Console())


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="DIR",
            help="Where the transferred adapters go.  (Default: lorax-demo, replaced if there.)",
            show_default=False,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what an earlier run left there.")
    ] = False,
) -> None:
    """Move a real adapter between two real models by every method, and score each on its task."""
    with _session(verbose=False, quiet=False, as_json=True):
        from .demo.run import show_demo

        show_demo(output or Path("lorax-demo"), overwrite=overwrite or output is None)


@contextmanager
def _session(
    verbose: bool, quiet: bool, as_json: bool
) -> Iterator[Callable[[str, int, int], None] | None]:
    """Log and show progress on standard error; end an error in one sentence and status 1."""
    errors = Console(stderr=True)
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    handler = RichHandler(console=errors, show_time=False, show_path=False, markup=False)
    loggers = [logging.getLogger(name) for name in ("lorax_transfer", "lorax_kernels")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(level)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=quiet or as_json or not errors.is_terminal,
    )
    tasks: dict[str, Any] = {}

    def progress(stage: str, done: int, count: int) -> None:
        if stage not in tasks:
            tasks[stage] = bar.add_task(stage, total=count)
        bar.update(tasks[stage], completed=done)

    try:
        with bar:
            yield progress
    except TransferError as error:
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        errors.print("interrupted; nothing was left half-written")
        raise typer.Exit(130) from None
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def _print_report(done: "Report", as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(done.to_json(), nl=False)
    elif not quiet:
        from .tables import show

        show(done, Console())


def _command_line() -> str:
    return shlex.join(["lorax-transfer", *sys.argv[1:]])


add_commands(app, _session, _command_line)

if __name__ == "__main__":
    main()
