# SPDX-License-Identifier: Apache-2.0
"""The commands that make one adapter of others on the same base: resize, fold and merge."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from ._options import (
    HOW,
    WHERE,
    Backend,
    Cache,
    Device,
    Drop,
    Dtype,
    Json,
    Output,
    Overwrite,
    Quiet,
    ReportFile,
    Verbose,
)

if TYPE_CHECKING:
    from ._recompression import Recompression

Progress = Callable[[str, int, int], None]
Session = Callable[[bool, bool, bool], AbstractContextManager[Progress | None]]

CutRank = Annotated[
    int | None,
    typer.Option(
        "--rank",
        min=1,
        metavar="N",
        help="At most this rank in every layer.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
CutEnergy = Annotated[
    float | None,
    typer.Option(
        "--energy",
        metavar="F",
        help="In every layer the smallest rank that keeps this share of its energy, such as 0.99; "
        "with --rank at most that many.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Report only, write no adapter.", rich_help_panel=WHERE),
]


class _ManyWeights(TyperCommand):
    """Lets `--weights` take all the numbers that follow it."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, _spread(args))


def _spread(args: list[str]) -> list[str]:
    """`--weights 1 0.5` as click reads it: the option again before every number."""
    spread: list[str] = []
    is_weight = False
    for i, word in enumerate(args):
        if word == "--":
            return spread + args[i:]
        if is_weight and spread[-1] != "--weights" and _is_number(word):
            spread.append("--weights")
        elif is_weight and spread[-1] != "--weights":
            is_weight = False
        spread.append(word)
        is_weight = is_weight or word == "--weights"
    return spread


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def add_commands(app: typer.Typer, session: Session, command_line: Callable[[], str]) -> None:
    """Add the commands to the command line.

    Args:
        app: the command line.
        session: called as `session(verbose, quiet, as_json)`; a context that logs, shows progress
            and ends errors.
        command_line: the command line to record.
    """

    @app.command()
    def resize(
        adapter: Annotated[
            str,
            typer.Argument(metavar="ADAPTER", help="Directory of a PEFT LoRA.", show_default=False),
        ],
        output: Output = None,
        rank: CutRank = None,
        energy: CutEnergy = None,
        drop: Drop = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        backend: Backend = "auto",
        dry_run: DryRun = False,
        overwrite: Overwrite = False,
        report: ReportFile = None,
        as_json: Json = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        """Cut ADAPTER to a lower rank, every layer optimally, and write it to --output."""
        needs_output(output, dry_run)
        if rank is None and energy is None:
            raise typer.BadParameter("give one of them, or both.", param_hint="--rank / --energy")
        with session(verbose, quiet, as_json) as progress:
            from ._resize import resize as run

            done = run(
                adapter,
                output,
                rank=rank,
                energy=energy,
                drop=drop or (),
                dtype=dtype,
                device=device,
                backend=backend,
                dry_run=dry_run,
                overwrite=overwrite,
                report=report,
                progress=progress,
                command=command_line(),
            )
        _print(done, as_json, quiet)

    @app.command()
    def fold(
        adapter: Annotated[
            str,
            typer.Argument(
                metavar="ADAPTER", help="Directory of a LoRA-X adapter.", show_default=False
            ),
        ],
        base: Annotated[
            str,
            typer.Option(
                "--base",
                metavar="BASE",
                help="Base model that it was trained on.",
                show_default=False,
            ),
        ],
        output: Annotated[
            Path,
            typer.Option(
                "--output", "-o", metavar="DIR", help="Directory to write.", show_default=False
            ),
        ],
        dtype: Dtype = "auto",
        device: Device = "auto",
        backend: Backend = "auto",
        cache: Cache = None,
        overwrite: Overwrite = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        """Make an ordinary LoRA of a LoRA-X ADAPTER: the same update, loadable by stock PEFT."""
        with session(verbose, quiet, False) as progress:
            from ._fold import fold as run

            run(
                adapter,
                base,
                output,
                dtype=dtype,
                device=device,
                backend=backend,
                cache=cache,
                overwrite=overwrite,
                progress=progress,
                command=command_line(),
            )

    @app.command(cls=_ManyWeights)
    def merge(
        adapters: Annotated[
            list[str],
            typer.Argument(
                metavar="ADAPTER", help="Two or more PEFT LoRA directories.", show_default=False
            ),
        ],
        output: Output = None,
        weights: Annotated[
            list[float] | None,
            typer.Option(
                metavar="W...",
                help="A number for each adapter, in their order.  (Default: 1 each.)",
                show_default=False,
                rich_help_panel=HOW,
            ),
        ] = None,
        rank: CutRank = None,
        energy: CutEnergy = None,
        drop: Drop = None,
        dtype: Dtype = "auto",
        device: Device = "auto",
        backend: Backend = "auto",
        dry_run: DryRun = False,
        overwrite: Overwrite = False,
        report: ReportFile = None,
        as_json: Json = False,
        verbose: Verbose = False,
        quiet: Quiet = False,
    ) -> None:
        """Add adapters of one base model, with weights, and write the sum to --output.

        The sum is exact, and its rank the sum of the ranks, unless --rank or --energy cut it.
        """
        needs_output(output, dry_run)
        with session(verbose, quiet, as_json) as progress:
            from ._merge import merge as run

            done = run(
                adapters,
                output,
                weights=weights or None,
                rank=rank,
                energy=energy,
                drop=drop or (),
                dtype=dtype,
                device=device,
                backend=backend,
                dry_run=dry_run,
                overwrite=overwrite,
                report=report,
                progress=progress,
                command=command_line(),
            )
        _print(done, as_json, quiet)


def needs_output(output: Path | None, dry_run: bool) -> None:
    """End with the usage if there is nowhere to write to."""
    if output is None and not dry_run:
        raise typer.BadParameter(
            "none was given; only a --dry-run does without.", param_hint="--output"
        )


def _print(done: "Recompression", as_json: bool, quiet: bool) -> None:
    if as_json:
        typer.echo(done.to_json(), nl=False)
    elif not quiet:
        from ._recompress import show

        show(done, Console())
