"""The layers that are done, each a part on disk with a report in the journal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

from distprune.checkpoint import ShardWriter, WrittenFile
from distprune.decoder_layer import DecoderLayer, LayerShape, layer_from_state
from distprune.distillation.layerwise import DistillationReport
from distprune.engine.stages.assembling import pruned_config
from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.run.preflight import Job
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.report import Report
from distprune.engine.worker.host_tensor import unpack_all
from distprune.engine.worker.actor import Finished

# Kinds of parts, and of the reports about them.
PRUNED, DISTILLED = "pruned-layer", "distilled-layer"


class LayerFiles:
    """Pruned layers, each replaced by its distilled form where there is such a stage.

    A layer is done when its part is there; its report is written before.
    """

    def __init__(self, job: Job, plan: Sequence[LayerShape], writer: ShardWriter, journal: Journal, progress: Progress):
        self._family, self._plan, self._config = job.family, plan, pruned_config(job, plan)
        self._writer, self._journal, self._progress = writer, journal, progress
        self._layers, self._final = range(len(plan)), DISTILLED if job.config.distill else PRUNED

    def pruned(self) -> set[int]:
        """The layers that need no pruning any more."""
        parts = self._writer.done()
        return {i for i in self._layers if not parts.isdisjoint({entry_of(PRUNED, i), entry_of(DISTILLED, i)})}

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
        self._keep(entry_of(PRUNED, index), index, finished, report)

    def keep_distilled(self, index: int, finished: Finished, lesson: DistillationReport) -> None:
        self._keep(entry_of(DISTILLED, index), index, finished, lesson)
        self._writer.drop(entry_of(PRUNED, index))

    def _keep(self, part: str, index: int, finished: Finished, report: Report | DistillationReport) -> None:
        self._journal.write(part, asdict(report))
        if isinstance(finished, WrittenFile):
            self._writer.accept(part, finished)
        else:
            layer = layer_from_state(unpack_all(finished), self._plan[index])
            self._writer.put(part, self._family.layer_to_checkpoint(layer, index))

    def read(self, index: int) -> DecoderLayer:
        """A pruned layer that is not yet distilled."""
        tensors = self._writer.read(entry_of(PRUNED, index))
        return self._family.layer_from_checkpoint(tensors, self._config, index)

    def parts(self) -> list[str]:
        """The parts that the checkpoint is made of."""
        return [entry_of(self._final, index) for index in self._layers]

    def reports(self) -> list[Report]:
        return [Report(**self._journal.report(entry_of(PRUNED, index))) for index in self._layers]

    def lessons(self) -> list[DistillationReport | None]:
        if self._final == PRUNED:
            return [None for _ in self._layers]
        return [DistillationReport(**self._journal.report(entry_of(DISTILLED, index))) for index in self._layers]
