# SPDX-License-Identifier: Apache-2.0
"""The two calls of the package: `transfer` and `scan`."""

from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ._run import Progress, Run
from .adapters import Adapter, LoraLayer, write_adapter
from .adapters.files import write_native
from .adapters.peft_names import is_target_module
from .checkpoints import Checkpoint
from .errors import OutputError, TransferError
from .preflight import PathLike, check_output
from .provenance import card, provenance
from .report import Report
from .settings import DEFAULT_DIRECTIONS, Settings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def transfer(
    adapter: PathLike,
    source: PathLike,
    target: PathLike,
    output: PathLike | None = None,
    *,
    method: str = "lorax",
    rank: int | None = None,
    energy: float | None = None,
    strength: float | None = None,
    directions: int = DEFAULT_DIRECTIONS,
    embeddings: float = 0.0,
    min_similarity: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    drop: Collection[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    backend: str = "auto",
    form: str = "auto",
    dry_run: bool = False,
    strict: bool = False,
    overwrite: bool = False,
    report: PathLike | None = None,
    plot: PathLike | None = None,
    cache: PathLike | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report:
    """Move a LoRA adapter to another base model and write it.

    Weights are read a few at a time, so memory does not grow with the models. The output appears
    whole or not at all.

    Args:
        adapter: directory of a PEFT LoRA, or of a LoRA-X adapter in its native form.
        source: base model that it was trained on: a directory of safetensors, a .safetensors or
            .gguf file, or a Hugging Face id.
        target: base model to move it to, likewise.
        output: directory to write; may be left out of a dry run.
        method: "lorax" projects the update on the target's leading subspaces, "prolora" keeps the
            part outside of them as well, "transport" rotates along the subspaces, "anchor" undoes
            the drift of the weights where the update reads and writes, "restore" undoes its largest
            directions, "aligned" finds layers that correspond between models of another depth or
            width and maps between them, "copy" carries the factors as they are (docs/methods.md).
        rank: singular directions to keep in every layer; by default 320, capped in each layer at
            the shorter side of its weight, and for a LoRA-X adapter its own rank.
        energy: keep the fewest directions that hold this share of each target weight's energy, in
            (0, 1]; with `rank` at most that many.
        strength: share of the drift that "anchor" and "restore" undo, in [0, 1]; None for all of it
            with "anchor", and with "restore" for a share that falls with a layer's drift, to half
            at the least unless what stays the target's moved more than twice as far.
        directions: directions of each layer's drift that "restore" undoes, and of that of the
            embeddings.
        embeddings: share of the drift of the embeddings to undo beside the method, in [0, 1]. The
            adapter then updates them too, and a tied output layer with them; merge it only after
            untying the two. What it has on either is carried as it is beside that
            (docs/methods.md).
        min_similarity: leave a layer out, instead of moving it, where the similarity of U or V is
            lower, in [0, 1]; ProLoRA used 0.8. The target then has no adapter there.
        include: regular expression; only modules whose path contains it are moved.
        exclude: regular expression; modules whose path contains it are not moved.
        drop: kinds of content to leave behind, most of which a transfer cannot carry, such as
            "dora" or "modules_to_save" (keys of `lorax_transfer.adapters.DROPPABLE`).
        dtype: of the written factors: "auto" (the adapter's own), "fp32", "bf16" or "fp16".
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        backend: "auto", "cuda", "triton" or "reference".
        form: what a LoRA-X adapter becomes: "lorax" (cores again), "lora" (factors that stock PEFT
            loads), or "auto": cores where the method leaves the update in the target's bases.
        dry_run: plan only: no weight is read (but by "aligned", to find the layers that
            correspond) and nothing is written.
        strict: raise, and write no adapter, if a layer falls below `min_similarity`, changes shape,
            or has a basis above its tolerance.
        overwrite: replace an existing adapter in `output`.
        report: .json file to write the report to.
        plot: .png file to draw the report in.
        cache: directory of bases to reuse and add to; by default that of the environment variable
            LORAX_TRANSFER_CACHE, and none without it.
        progress: called as `progress(stage, done, total)`.
        command: command line to record in the adapter.

    Returns:
        The report.

    Raises:
        TransferError: something is missing, broken, or does not fit together; the subclasses in
            `lorax_transfer.errors` say what.

    Example:
        >>> report = transfer("adapter", "base", "tuned", "moved")  # doctest: +SKIP
        >>> report.totals.energy_written  # doctest: +SKIP
        0.51
    """
    settings = Settings(
        method,
        rank,
        energy,
        min_similarity,
        include,
        exclude,
        dtype,
        device,
        backend,
        form,
        strength,
        directions,
        embeddings,
    )
    if output is None and not dry_run:
        raise OutputError("no output was given, expected a directory to write; or ask for a plan.")
    if output is not None:
        check_output(Path(output), overwrite)
    run = Run(settings, drop, strict, report, plot, cache, progress, command)
    with run.opened(adapter, source, target, dry_run):
        if dry_run:
            return run.save(run.plan_report())
        results = run.measure()
        measured = run.finish(results)
        run.check_strict(measured)
        # In the adapter's order: batches are by shape.
        moved = {
            module: layer
            for module in run.adapter.layers
            if module in results and (layer := results[module].layer) is not None
        }
        if not moved:
            run.save(measured)
            raise TransferError(
                f"none of the {len(results)} layers reaches a similarity of {min_similarity}, so "
                "there is nothing to write; lower --min-similarity or use --method copy without it."
            )
        cores = run.contracted(results)
        done = run.finish(results, hashes=run.hashes(), is_written=True)
        done = replace(done, output=str(output))
        if cores is not None:
            write_native(
                cores,
                Path(output or ""),
                base_model_name_or_path=run.target.location,
                provenance=provenance(done),
                model_card=card(done, run.cut, is_lorax=True),
                overwrite=overwrite,
            )
            return run.save(done)
        placed = _placed(run.adapter, run.target)
        layers = _cast(moved, run.adapter, settings.dtype)
        layers += _like(run.beyond.layers, layers[0])
        if any(layer.is_embedding for layer in layers):
            is_tied = done.updates_tied_embeddings
            placed = replace(placed, config={**placed.config, "ensure_weight_tying": is_tied})
        write_adapter(
            placed.with_layers(layers),
            Path(output or ""),
            base_model_name_or_path=run.target.location,
            provenance=provenance(done),
            model_card=card(done, run.cut),
            dtype=_DTYPES.get(settings.dtype),
            overwrite=overwrite,
        )
        return run.save(done)


def scan(
    adapter: PathLike,
    source: PathLike,
    target: PathLike,
    *,
    method: str = "lorax",
    rank: int | None = None,
    energy: float | None = None,
    strength: float | None = None,
    directions: int = DEFAULT_DIRECTIONS,
    min_similarity: float | None = None,
    include: str | None = None,
    exclude: str | None = None,
    drop: Collection[str] = (),
    device: str = "auto",
    backend: str = "auto",
    report: PathLike | None = None,
    plot: PathLike | None = None,
    cache: PathLike | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report:
    """Measure what a transfer would do, and recommend a method, or none.

    Every method is measured whatever `method` says; it chooses only which one the table shows
    layer by layer. No adapter is written, and the models are not hashed.

    Args:
        adapter: as for `transfer`, like the arguments that follow.
        source: base model that the adapter was trained on.
        target: base model to move it to.
        method: method to show.
        rank: singular directions to keep; by default 320, capped in each layer.
        energy: share of each target weight to keep.
        strength: share of the drift that "anchor" and "restore" undo; None as in `transfer`.
        directions: directions of each layer's drift that "restore" undoes.
        min_similarity: layers below it are reported as left out.
        include: regular expression of modules to measure.
        exclude: regular expression of modules to pass over.
        drop: kinds of content to pass over.
        device: where to compute.
        backend: backend of the kernels.
        report: .json file to write the report to.
        plot: .png file to draw the report in.
        cache: directory of bases to reuse and add to.
        progress: called as `progress(stage, done, total)`.
        command: command line to record in the report.

    Returns:
        The report.

    Raises:
        TransferError: as `transfer` does.

    Example:
        >>> scan("adapter", "base", "tuned").recommendation.verdict  # doctest: +SKIP
        'anchor'
    """
    settings = Settings(
        method,
        rank,
        energy,
        min_similarity,
        include,
        exclude,
        device=device,
        backend=backend,
        strength=strength,
        directions=directions,
    )
    run = Run(settings, drop, False, report, plot, cache, progress, command)
    with run.opened(adapter, source, target):
        return run.save(run.finish(run.measure(), kind="scan"))


def _placed(adapter: Adapter, target: Checkpoint) -> Adapter:
    """The adapter, made to name its modules one by one where its patterns reach further.

    In a deeper target, "q_proj" would stand for layers that the adapter holds nothing for.
    """
    patterns = adapter.config.get("target_modules")
    paths = [name.removesuffix(".weight") for name in target.names() if name.endswith(".weight")]
    if sum(is_target_module(path, patterns) for path in paths) > len(adapter.targets):
        return replace(adapter, targets=(*adapter.targets, ""))
    return adapter


def _like(layers: Sequence[LoraLayer], model: LoraLayer) -> list[LoraLayer]:
    """Layers that the adapter did not have, in the dtype of one that it has."""
    dtype = model.lora_B.dtype
    return [x.with_factors(x.lora_B.to(dtype), x.lora_A.to(dtype)) for x in layers]


def _cast(layers: dict[str, LoraLayer], adapter: Adapter, dtype: str) -> list[LoraLayer]:
    """Under "auto" each factor gets its own dtype back; otherwise the writer rounds, once."""
    if dtype != "auto":
        return list(layers.values())
    return [
        layer.with_factors(
            layer.matrix_B.to(adapter.layers[module].lora_B.dtype),
            layer.matrix_A.to(adapter.layers[module].lora_A.dtype),
        )
        for module, layer in layers.items()
    ]
