"""The layers that are done, each a part on disk with a report in the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor

from distprune.checkpoint import ShardWriter, WrittenFile
from distprune.distillation.layerwise import DistillationReport
from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.run.preflight import Job
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.host_tensor import unpack, unpack_all
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.report import Report
from distprune.layers.module import say_shape
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape

# Kinds of parts, and of the reports about them.
PRUNED, DISTILLED = "pruned-layer", "distilled-layer"
#: The tensor beside a report that says which rotary pairs are left.
PAIRS = "rotary_pairs"


class LayerFiles:
    """Pruned layers, each replaced by its distilled form where there is such a stage.

    A layer is done when its part is there; its report is written before.

    Args:
        kind: of the parts that pruned layers become: PRUNED, or that of a round before the last.
    """

    def __init__(
        self,
        job: Job,
        plan: Sequence[LayerShape],
        writer: ShardWriter,
        journal: Journal,
        progress: Progress,
        kind: str = PRUNED,
    ):
        self._kind = kind
        self._model, self._plan = job.model, plan
        self._writer, self._journal, self._progress = writer, journal, progress
        self._layers, self._final = range(len(plan)), DISTILLED if job.config.distill else PRUNED

    def pruned(self) -> set[int]:
        """The layers that need no pruning any more."""
        parts = self._writer.done()
        return {i for i in self._layers if not parts.isdisjoint({entry_of(self._kind, i), entry_of(DISTILLED, i)})}

    def distilled(self) -> set[int]:
        """The layers that need no distillation any more."""
        parts = self._writer.done()
        done = {index for index in self._layers if entry_of(DISTILLED, index) in parts}
        for index in done:  # in case the run ended between the two steps of keep_distilled
            self._writer.drop(entry_of(PRUNED, index))
        return done

    def keep_pruned(self, index: int, finished: Finished, report: Report) -> None:
        for warning in report.warnings:
            self._progress.note(f"layer {index}: {warning}")
        self._keep(entry_of(self._kind, index), index, finished, report)

    def keep_distilled(self, index: int, finished: Finished, report: DistillationReport) -> None:
        self._keep(entry_of(DISTILLED, index), index, finished, report)
        self._writer.drop(entry_of(PRUNED, index))

    def _keep(self, part: str, index: int, finished: Finished, report: Report | DistillationReport) -> None:
        pairs = finished.rotary_pairs and unpack(finished.rotary_pairs)
        self._journal.write(part, asdict(report), {} if pairs is None else {PAIRS: pairs})
        if isinstance(finished.written, WrittenFile):
            self._writer.accept(part, finished.written)
        elif isinstance(finished.written, Sequence):
            self._writer.join(part, [unpack_all(piece) for piece in finished.written])
        else:
            self._writer.put(part, unpack_all(finished.written))

    def read(self, index: int) -> DecoderLayer:
        """A pruned layer that is not yet distilled."""
        tensors = self._writer.read(entry_of(self._kind, index))
        return self._model.from_disk(index, tensors, self._plan[index], self._pairs(self._kind, index))

    def drop_pruned(self) -> None:
        """Remove the pruned layers of a round that another one has followed."""
        for index in self._layers:
            self._writer.drop(entry_of(self._kind, index))

    def parts(self) -> list[str]:
        """The parts that the checkpoint is made of."""
        return [entry_of(self._final, index) for index in self._layers]

    def said_shapes(self) -> list[dict[str, Any]]:
        """Each layer's shape, as code in a checkpoint takes it."""
        of_class = self._model.architecture.class_shape
        return [say_shape(of_class(i), self._plan[i], self._pairs(self._final, i)) for i in self._layers]

    def _pairs(self, kind: str, index: int) -> Tensor | None:
        """The rotary pairs that a layer has kept."""
        return self._journal.tensors(entry_of(kind, index)).get(PAIRS)

    def reports(self) -> list[Report]:
        return [Report(**self._journal.report(entry_of(PRUNED, index))) for index in self._layers]

    def distillations(self) -> list[DistillationReport | None]:
        if self._final == PRUNED:
            return [None for _ in self._layers]
        return [DistillationReport(**self._journal.report(entry_of(DISTILLED, index))) for index in self._layers]
