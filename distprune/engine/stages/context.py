"""What the stages of one run share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from distprune.engine.run.journal import Journal
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.telemetry.progress import Progress
from distprune.layers.expert_chunks import in_chunks
from distprune.layers.shapes import ExpertsShape, FeedForwardShape, LayerShape


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
        experts_at_once: how many of a mixture's experts are in memory at a time; None where all are.
        mixtures: of the layers that have one, how many experts it has.
    """

    journal: Journal
    block_length: int
    micro_batch: int
    experts_at_once: int | None = None
    mixtures: Mapping[int, int] = field(default_factory=dict)

    @property
    def in_one_piece(self) -> bool:
        """Whether all samples go from layer to layer together."""
        return self.experts_at_once is not None

    @property
    def mixtures_in_chunks(self) -> Collection[int]:
        """The layers whose experts come a chunk at a time."""
        return () if self.experts_at_once is None else self.mixtures.keys()

    def dense_chunks(self, index: int) -> int:
        """How many chunks of experts a layer of the dense model has."""
        assert self.experts_at_once is not None
        return len(in_chunks(self.mixtures[index], self.experts_at_once))

    def chunks_of(self, planned: FeedForwardShape | ExpertsShape | None) -> int:
        """How many chunks of experts a pruned layer has."""
        if self.experts_at_once is None or not isinstance(planned, ExpertsShape):
            return 0
        return len(in_chunks(planned.count, self.experts_at_once))

    def begins_block(self, index: int) -> bool:
        """Whether a layer is pruned on the dense model's hidden states."""
        return index % self.block_length == 0

    def ends_block(self, index: int) -> bool:
        """Whether no layer is pruned on the output of this one."""
        return index + 1 == self.layers or self.begins_block(index + 1)


def mixtures_of(shapes: Iterable[LayerShape]) -> dict[int, int]:
    """The layers that have a mixture of experts, of all layers' shapes, and how many it has."""
    return {index: shape.ffn.count for index, shape in enumerate(shapes) if isinstance(shape.ffn, ExpertsShape)}
