# SPDX-License-Identifier: Apache-2.0
"""One run, step by step: open, plan, measure, report; `transfer` and `scan` are made of these."""

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lorax_kernels as lk

from ._alignment import carry, find_alignment
from ._embeddings import Beyond, look_beyond
from ._native import contract, expand, outline
from .adapters import Adapter, lorax_form, read_adapter
from .adapters.kinds import check_drop
from .adapters.lorax import NativeAdapter, is_lorax, read_lorax
from .atomic import atomic_file
from .bases import BasisMaker
from .checkpoints import Checkpoint, open_checkpoint
from .engine import Engine, Result
from .errors import TransferError
from .plan import BATCH_BYTES, LayerPlan, make_plan
from .preflight import PathLike, check_file, pick_device, probe_backend
from .recommend import recommend
from .report import LayerReport, Model, Report
from .settings import TOLERANCE, Settings
from .totals import total

Progress = Callable[[str, int, int], None]

CACHE_VARIABLE = "LORAX_TRANSFER_CACHE"
_GPU_BYTES = 2 << 30
_log = logging.getLogger("lorax_transfer")


@dataclass
class Run:
    """One call, step by step; its inputs are there between `opened` and its end."""

    settings: Settings
    drop: Collection[str]
    strict: bool
    report_path: PathLike | None
    plot_path: PathLike | None
    cache: PathLike | None
    progress: Progress | None
    command: str | None

    @contextmanager
    def opened(
        self, adapter: PathLike, source: PathLike, target: PathLike, is_dry: bool = False
    ) -> Iterator[None]:
        """Check what can be checked at once, read the adapter and plan."""
        self.started = time.perf_counter()
        check_file(self.report_path, ".json", "report")
        check_file(self.plot_path, ".png", "plot")
        if self.plot_path is not None:
            from . import plot  # noqa: F401  (fails now, not after the work, without matplotlib)
        self.native = read_lorax(adapter) if is_lorax(adapter) else None
        if self.native is None:
            if self.settings.form == "lorax":
                raise TransferError(
                    f"{adapter} is an ordinary LoRA, expected a LoRA-X adapter to write cores of; "
                    "leave out --form."
                )
            self.adapter = read_adapter(adapter, drop=self.drop)
        elif self.settings.dtype != "auto" and self.settings.form != "lora":
            raise TransferError(
                f"dtype is {self.settings.dtype}, but cores are float32; add --form lora to write "
                "factors of that dtype."
            )
        if self.native is not None and (self.settings.form == "lora" or self.settings.embeddings):
            self.native.check_foldable()
        with open_checkpoint(source) as self.source, open_checkpoint(target) as self.target:
            if self.native is not None:
                self.adapter = self._expand(self.native, is_dry)
            self.alignment = None
            if self.settings.method == "aligned":
                self.alignment = find_alignment(
                    self.adapter,
                    self.source,
                    self.target,
                    self.settings,
                    pick_device(self.settings.device),
                )
            self.plan = make_plan(
                self.adapter, self.source, self.target, self.settings, self.alignment
            )
            self.beyond = Beyond()
            yield

    def measure(self) -> dict[str, Result]:
        """Run the plan."""
        device, bases = self._basis_maker()
        aligned = {}
        if self.alignment is not None:
            aligned = dict(carry(self.alignment, self.adapter, self.plan, device))
        elif self.settings.embeddings or not any(x.is_reshaped for x in self.plan.layers):
            with _enough_memory(device):
                self.beyond = look_beyond(
                    self.plan, self.source, self.target, self.settings, device
                )
        engine = Engine(
            self.source,
            self.target,
            self.settings,
            device,
            bases,
            bases.workspace,
            keeps_bases=self.native is not None,
            aligned=aligned,
            outside=self.beyond.left(self.settings.embeddings > 0),
        )
        count, done = len(self.plan.layers), 0

        def step(layers: int) -> None:
            nonlocal done
            done += layers
            self._tell("layers", done, count)

        self._tell("layers", 0, count)
        with _enough_memory(device):
            return engine.run(self.adapter, self.plan, step)

    def _basis_maker(self) -> tuple[torch.device, BasisMaker]:
        device = pick_device(self.settings.device)
        probe_backend(device, self.settings.backend)
        cache = self.cache or os.environ.get(CACHE_VARIABLE) or None
        is_lorax = self.native is not None
        bases = BasisMaker(
            tol=lorax_form.TOLERANCE if is_lorax else TOLERANCE,
            backend=self.settings.backend,
            # A GPU has room to batch wider; in main memory the promise is a few weights at a time.
            workspace=BATCH_BYTES if device.type == "cpu" else _GPU_BYTES,
            cache=None if cache is None else Path(cache),
            # The cores of LoRA-X stand between single vectors, not between subspaces.
            is_exact=is_lorax,
        )
        return device, bases

    def _expand(self, native: NativeAdapter, is_dry: bool) -> Adapter:
        if is_dry:
            return outline(native, self.source)
        device, bases = self._basis_maker()
        count, done = len(native.layers), 0

        def step(layers: int) -> None:
            nonlocal done
            done += layers
            self._tell("bases", done, count)

        self._tell("bases", 0, count)
        with _enough_memory(device):
            return expand(native, self.source, bases, device, step)

    def contracted(self, results: dict[str, Result]) -> NativeAdapter | None:
        """What is to be written as cores; None where it is to be written as factors."""
        if self.native is None or self.settings.form == "lora" or self.settings.embeddings:
            return None
        moved = {}
        for module in self.adapter.layers:
            result = results.get(module)
            if result is not None and result.layer is not None and result.basis is not None:
                moved[module] = (result.layer, result.basis)
        found = contract(self.native, moved, self.plan, self.target)
        if isinstance(found, NativeAdapter):
            return found
        if self.settings.form == "lorax":
            raise TransferError(
                f"method {self.settings.method} takes the update of {found} out of the target's "
                "leading subspaces, so that no core stands for it; use --form lora, or --method "
                "lorax."
            )
        self.native.check_foldable()
        return None

    @property
    def cut(self) -> str:
        """Where the bases are cut, in words."""
        is_own = self.settings.rank is None and self.settings.energy is None
        if self.native is not None and is_own:
            return "rank that of the adapter"
        return self.settings.cut

    def hashes(self) -> tuple[str | None, str | None]:
        """Content hashes of source and target."""
        found = []
        for i, checkpoint in enumerate((self.source, self.target)):
            self._tell("hashing", i, 2)
            found.append(checkpoint.content_hash())
        self._tell("hashing", 2, 2)
        return found[0], found[1]

    def plan_report(self) -> Report:
        """The report of a dry run."""
        layers = {planned.module: self._planned(planned) for planned in self.plan.layers}
        return self._report("plan", layers, (None, None))

    def finish(
        self,
        results: dict[str, Result],
        kind: str = "transfer",
        hashes: tuple[str | None, str | None] = (None, None),
        is_written: bool = False,
    ) -> Report:
        """The report of what was measured, and, if so, of what is being written."""
        layers = {module: result.report for module, result in results.items()}
        if is_written:
            for module, result in results.items():
                if result.layer is not None:
                    layers[module] = replace(layers[module], status="transferred")
        done = self._report(kind, layers, hashes)
        return replace(
            done, recommendation=recommend(done.totals, done.alignment), warnings=_warnings(done)
        )

    def check_strict(self, done: Report) -> None:
        """Raise under `strict` if a layer is not as it should be; the report is saved first."""
        if not self.strict:
            return
        bad = [x for x in done.layers if x.status == "left out" or not x.is_validated]
        bad += [x for x in done.layers if (x.svd_error or 0) > TOLERANCE and x not in bad]
        if bad:
            self.save(done)
            more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
            raise TransferError(
                f"strict: {bad[0].module}{more} of {len(done.layers)} layers did not pass: "
                f"{bad[0].reason}; no adapter was written."
            )

    def save(self, done: Report) -> Report:
        """Log the warnings, and write the report and the plot where they were asked for."""
        done = replace(done, seconds=time.perf_counter() - self.started)
        for warning in done.warnings:
            _log.warning(warning)
        if self.report_path is not None:
            with atomic_file(self.report_path) as temporary:
                temporary.write_text(done.to_json(), encoding="utf-8")
        if self.plot_path is not None:
            from .plot import draw

            with atomic_file(self.plot_path) as temporary:
                draw(done, temporary)
        return done

    def _planned(self, planned: LayerPlan) -> LayerReport:
        return LayerReport(
            module=planned.module,
            status="planned",
            reason=planned.reason,
            method=planned.method(self.settings.method),
            lora_rank=planned.lora_rank,
            rank=planned.rank,
            source_tensor=planned.source_tensor,
            target_tensor=planned.target_tensor,
            source_shape=planned.source_shape,
            target_shape=planned.target_shape,
            is_validated=not planned.is_reshaped,
            given_back=planned.given_back,
        )

    def _report(
        self, kind: str, layers: dict[str, LayerReport], hashes: tuple[str | None, str | None]
    ) -> Report:
        for module, reason in self.plan.excluded.items():
            layer = self.adapter.layers[module]
            norm = lk.update_norm(layer.matrix_B, layer.matrix_A) * abs(layer.scale)
            layers[module] = LayerReport(
                module, "excluded", reason, self.settings.method, layer.rank, update_norm=norm
            )
        ordered = tuple(layers[module] for module in self.adapter.layers)
        tables = {planned.module for planned in self.plan.layers if planned.is_table}
        drifts = [self.beyond.embedding_drift, *(layers[module].drift for module in tables)]
        settings: dict[str, Any] = {**asdict(self.settings), "tol": TOLERANCE}
        settings.update(drop=sorted(check_drop(self.drop)), strict=self.strict)
        return Report(
            kind=kind,
            version=lk.__version__,
            command=self.command,
            adapter=Model(
                str(self.adapter.location),
                None,
                "peft" if self.native is None else "lorax",
                self.adapter.content_hash,
                rule="",
            ),
            source=_model(self.source, hashes[0], self.plan.source_rule),
            target=_model(self.target, hashes[1], self.plan.target_rule),
            settings=settings,
            dropped=self.adapter.dropped,
            dropped_kinds=self.adapter.dropped_kinds,
            layers=ordered,
            totals=replace(
                total(ordered, TOLERANCE, tables),
                embedding_drift=max((x for x in drifts if x is not None), default=None),
                untouched_drift=self.beyond.drift,
            ),
            embeddings=self.beyond.reports,
            alignment=None if self.alignment is None else self.alignment.facts,
            recommendation=None,
            warnings=(),
            memory_bytes=self.plan.memory_bytes,
            seconds=0.0,
            output=None,
        )

    def _tell(self, stage: str, done: int, count: int) -> None:
        if self.progress is not None:
            self.progress(stage, done, count)


@contextmanager
def _enough_memory(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise TransferError(
            f"{device} has too little memory for a layer of this model; use --device cpu."
        ) from error


def _model(checkpoint: Checkpoint, content_hash: str | None, rule: str) -> Model:
    return Model(
        checkpoint.location, checkpoint.revision, checkpoint.format, content_hash, rule=rule
    )


def _warnings(done: Report) -> tuple[str, ...]:
    totals, found = done.totals, []
    if totals.unvalidated:
        found.append(
            f"{totals.unvalidated} of {totals.layers} layers change shape, and no one has "
            "shown that a transfer between shapes carries what an adapter learned."
        )
    if totals.left_out:
        found.append(
            f"{totals.left_out} of {totals.layers} layers are below the similarity asked for and "
            "get no adapter."
        )
    if totals.above_tolerance:
        found.append(
            f"{totals.above_tolerance} of {totals.layers} layers have a basis above its tolerance "
            f"of {TOLERANCE:g}; the singular values at their cut are too close, so try another "
            "rank."
        )
    if done.updates_tied_embeddings:
        found.append(
            "the adapter updates embeddings that are tied to the output layer: PEFT computes with "
            "it as it should, but merging would add the updates of both to the one weight; untie "
            "the two in the base model before you merge."
        )
    drifts = [x.drift for x in done.layers if x.is_measured]
    if drifts and all(drift == 0 for drift in drifts):
        found.append(
            "source and target are identical in every layer, so the adapter fits the target as it "
            "is; check that these are the models you mean."
        )
    return tuple(found)
