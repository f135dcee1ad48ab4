"""What the stages of one run share."""

from __future__ import annotations

from dataclasses import dataclass

from distprune.engine.run.journal import Journal
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.telemetry.progress import Progress


@dataclass(frozen=True)
class FirstStages:
    """What the stages before the first pass need, which keep nothing.

    Attributes:
        pool: the workers.
        progress: what is told.
        layers: of the model.
    """

    pool: WorkerPool
    progress: Progress
    layers: int


@dataclass(frozen=True)
class RunContext(FirstStages):
    """One run, as its stages see it.

    Attributes:
        journal: what was done by now, and what is to be kept.
        block_length: layers in a row that are pruned on each other's outputs.
        micro_batch: samples that are never parted.
        in_one_piece: whether all samples go from layer to layer together.
    """

    journal: Journal
    block_length: int
    micro_batch: int
    in_one_piece: bool = False

    def begins_block(self, index: int) -> bool:
        """Whether a layer is pruned on the dense model's hidden states."""
        return index % self.block_length == 0

    def ends_block(self, index: int) -> bool:
        """Whether no layer is pruned on the output of this one."""
        return index + 1 == self.layers or self.begins_block(index + 1)
