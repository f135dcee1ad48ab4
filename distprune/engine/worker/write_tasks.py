"""Tasks that write: tensors that no pruning changes, and shards."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distprune.checkpoint import WrittenFile
from distprune.engine.telemetry.process_memory import PeakMemory, peak_memory
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.task import Task


@dataclass(frozen=True)
class Copy(Task):
    """Copy tensors by their names on disk, as they are stored, to the folder of parts or to the driver."""

    names: tuple[str, ...]

    def run(self, worker: LayerWorker) -> dict[str, Tensor] | WrittenFile:
        return worker.write(worker.model.checkpoint.read(self.names))


@dataclass(frozen=True)
class Merge(Task):
    """Merge the files of parts into that of a shard. None: they are not seen here, or are no longer there."""

    parts: tuple[str, ...]

    def run(self, worker: LayerWorker) -> WrittenFile | None:
        if worker.parts is None:
            return None
        try:
            return worker.parts.merge(self.parts)
        except FileNotFoundError:  # another worker has done the same meanwhile
            return None


@dataclass(frozen=True)
class MeasureMemory(Task):
    """The peak memory of the worker's process."""

    def run(self, worker: object) -> PeakMemory:
        return peak_memory()
