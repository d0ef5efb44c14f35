# SPDX-License-Identifier: Apache-2.0
"""The options that commands of `lorax-transfer` share."""

from pathlib import Path
from typing import Annotated, Literal

import typer

# Panels of the help.
WHAT, HOW, WHERE = "What is moved", "How", "Output"

Adapter = Annotated[
    str,
    typer.Argument(
        metavar="ADAPTER",
        help="Directory of a PEFT LoRA, or of a LoRA-X adapter.",
        show_default=False,
    ),
]
Source = Annotated[
    str,
    typer.Option(
        "--source",
        metavar="BASE",
        help="Base model that the adapter was trained on: a directory of safetensors, a "
        ".safetensors or .gguf file, or a Hugging Face id.",
        show_default=False,
    ),
]
Target = Annotated[
    str,
    typer.Option(
        "--target", metavar="BASE", help="Base model to move it to, likewise.", show_default=False
    ),
]
Method = Annotated[
    Literal["lorax", "prolora", "transport", "anchor", "restore", "aligned", "copy"],
    typer.Option(
        help="lorax projects the update on the target's leading subspaces; prolora keeps the part "
        "outside of them as well; transport rotates along the subspaces; anchor undoes the drift "
        "of the weights where the update reads and writes; restore undoes its largest directions, "
        "and with them a part of the target's own training; aligned is for another depth or width; "
        "copy carries the factors as they are.",
        rich_help_panel=HOW,
    ),
]
Strength = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        help="Share of the drift that anchor and restore undo; by default all with anchor, and "
        "with restore less the larger a layer's drift is, half at the least unless embeddings that "
        "stay the target's moved farther.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Directions = Annotated[
    int,
    typer.Option(
        metavar="N",
        min=1,
        help="Directions of each layer's drift that restore undoes; the written rank grows by it.",
        rich_help_panel=HOW,
    ),
]
Embeddings = Annotated[
    float,
    typer.Option(
        metavar="F",
        help="Share of the drift of the embeddings to undo as well, in --directions directions, 0 "
        "to 1, for a target whose embeddings moved farther than its layers, as scan says: 1 wins "
        "most, 0.5 costs the target's own skill least. It is added to an update that the adapter "
        "has there.",
        rich_help_panel=HOW,
    ),
]
Rank = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Singular directions to keep in every layer.  (Default: 320, less where a layer is "
        "smaller.)",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Energy = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        help="Keep the fewest directions that hold this share of each target weight's energy, "
        "such as 0.9; with --rank at most that many.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
MinSimilarity = Annotated[
    float | None,
    typer.Option(
        metavar="F",
        help="Leave a layer out where the similarity of its bases is lower, such as 0.8; the "
        "target then has no adapter there.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
Include = Annotated[
    str | None,
    typer.Option(
        metavar="RE",
        help="Only modules whose path contains this regular expression.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
Exclude = Annotated[
    str | None,
    typer.Option(
        metavar="RE",
        help="No modules whose path contains it.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
Drop = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KIND",
        help="Leave behind content that cannot be carried: dora, modules_to_save, bias, experts, "
        "trainable_tokens or mutated_init; or the update of an embedding table, which can where "
        "vocabulary and width are the same: embedding. Repeat for several.",
        show_default=False,
        rich_help_panel=WHAT,
    ),
]
Dtype = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option(help="Of the written factors; auto keeps the adapter's.", rich_help_panel=HOW),
]
Device = Annotated[
    str, typer.Option(metavar="auto|cpu|cuda:N", help="Where to compute.", rich_help_panel=HOW)
]
Backend = Annotated[
    Literal["auto", "cuda", "triton", "reference"],
    typer.Option(help="Kernels to use; see lorax-transfer info.", rich_help_panel=HOW),
]
Form = Annotated[
    Literal["auto", "lorax", "lora"],
    typer.Option(
        help="What a LoRA-X adapter becomes: lorax writes cores again, lora factors that PEFT "
        "loads; auto writes cores where the method leaves the update in the target's bases.",
        rich_help_panel=HOW,
    ),
]
Cache = Annotated[
    Path | None,
    typer.Option(
        envvar="LORAX_TRANSFER_CACHE",
        metavar="DIR",
        help="Keep the bases here and reuse them: for many adapters between the same models.",
        show_default=False,
        rich_help_panel=HOW,
    ),
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="DIR",
        help="Directory to write; needed unless --dry-run.",
        show_default=False,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an adapter in --output.", rich_help_panel=WHERE),
]
ReportFile = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE.json",
        help="Write the report there too.",
        show_default=False,
        rich_help_panel=WHERE,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.png",
        help="Draw the report.",
        show_default=False,
        rich_help_panel=WHERE,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print the report as JSON, and nothing else on standard output.",
        rich_help_panel=WHERE,
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say more.", rich_help_panel=WHERE)]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print errors only.", rich_help_panel=WHERE),
]
