"""What the stages of one run share."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from distprune.engine.run.journal import Journal
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.telemetry.progress import Progress
from distprune.layers.expert_chunks import in_chunks
from distprune.layers.shapes import ExpertsShape, FeedForwardShape, LayerShape
from distprune.methods import Method


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
        aiming: the layers that are pruned towards the dense model's hidden states around them.
        rounds: how often the model is planned and pruned.
        searches: whether parts of all layers are solved on the dense model's hidden states.
    """

    journal: Journal
    block_length: int
    micro_batch: int
    experts_at_once: int | None = None
    mixtures: Mapping[int, int] = field(default_factory=dict)
    aiming: Collection[int] = ()
    rounds: int = 1
    searches: bool = False

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

    def pruned_with(self, index: int) -> list[int]:
        """The layers whose pruning needs the dense model's hidden states at the input of layer ``index``, which may be
        the model's end."""
        begins = [index] if index < self.layers and (self.begins_block(index) or index in self.aiming) else []
        return begins + [index - 1] * (index - 1 in self.aiming)

    def keeps_dense(self, index: int) -> bool:
        """Whether the dense model's hidden states at the input of layer ``index``, or at the model's end, are needed
        after the passes through it: for pruning, for a search, or since further rounds begin and end with them."""
        return self.searches or bool(self.pruned_with(index)) or (self.rounds > 1 and index in (0, self.layers))

    def ends_block(self, index: int) -> bool:
        """Whether no layer is pruned on the output of this one."""
        return index + 1 == self.layers or self.begins_block(index + 1)


def layers_aiming(method: Method, shapes: Sequence[LayerShape], in_chunks: bool) -> list[int]:
    """The layers that a method prunes towards the dense model's hidden states, of all layers' dense shapes.

    Args:
        in_chunks: whether the experts of mixtures come a chunk at a time.
    """
    whole = [not (in_chunks and isinstance(shape.ffn, ExpertsShape)) for shape in shapes]
    return [index for index, shape in enumerate(shapes) if whole[index] and method.aims_at_dense(shape)]


def mixtures_of(shapes: Iterable[LayerShape]) -> dict[int, int]:
    """The layers that have a mixture of experts, of all layers' shapes, and how many it has."""
    return {index: shape.ffn.count for index, shape in enumerate(shapes) if isinstance(shape.ffn, ExpertsShape)}
