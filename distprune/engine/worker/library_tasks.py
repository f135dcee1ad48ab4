"""The tasks that fill a library with the parts of layers in several sizes, and that make layers of what it holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor

from distprune.budgets import PartShape
from distprune.checks import solving
from distprune.engine.worker.layer_pruning import LayerPruning
from distprune.engine.worker.layer_worker import Finished, LayerWorker
from distprune.engine.worker.report import Report, Stopwatch
from distprune.engine.worker.task import Task
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods import Profile
from distprune.search import LayerPart
from distprune.statistics import LayerStatistics, Moment


@dataclass(frozen=True)
class Differing:
    """What of a pruned layer is not as in the dense model.

    Attributes:
        tensors: by their names on disk.
        rotary_pairs: those that each KV group has kept, (g, p/2); None where all are there.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    rotary_pairs: Tensor | None = None

    def with_other(self, other: Differing) -> Differing:
        """The same of a layer in which the other part has changed too."""
        pairs = other.rotary_pairs if self.rotary_pairs is None else self.rotary_pairs
        return Differing({**self.tensors, **other.tensors}, pairs)


@dataclass(frozen=True)
class Chosen:
    """A layer that is made of parts from a library."""

    shape: LayerShape
    differing: Differing

    def layer(self, worker: LayerWorker, index: int, dense: DecoderLayer) -> DecoderLayer:
        """The layer, on the CPU, given the dense one."""
        if self.shape == dense.shape:
            return dense
        tensors = {**worker.model.to_disk(index, dense), **self.differing.tensors}
        return worker.model.from_disk(index, tensors, self.shape, self.differing.rotary_pairs)


@dataclass(frozen=True)
class SolvePart(Task):
    """One part of a dense layer in several sizes, the other part as it is, on the dense model's hidden states.

    Attributes:
        index: the layer.
        part: which part.
        shapes: its sizes.
        hidden_states: at the layer's input.
        profile: what the passes through the dense model have left of the layer.
    """

    index: int
    part: LayerPart
    shapes: Sequence[PartShape]
    hidden_states: Tensor
    profile: Profile

    def run(self, worker: LayerWorker) -> list[Differing]:
        layer = worker.read_layer(self.index)
        stored = worker.model.to_disk(self.index, layer)
        seen: dict[tuple[Moment, ...], LayerStatistics] = {}
        return [self._solved(worker, layer, stored, shape, seen) for shape in self.shapes]

    def _solved(
        self,
        worker: LayerWorker,
        layer: DecoderLayer,
        stored: Mapping[str, Tensor],
        shape: PartShape,
        seen: dict[tuple[Moment, ...], LayerStatistics],
    ) -> Differing:
        planned = replace(layer.shape, **{self.part: shape})
        pruning = LayerPruning(worker, self.index, layer, planned, self.hidden_states, seen_of_dense=seen)
        with solving(worker.method.name, self.index):
            pruned = pruning.prune(pruning.statistics({}), self.profile)
        made = worker.model.to_disk(self.index, pruned.to("cpu"))
        pairs = None if pruned.attention is None else pruned.attention.rotary_pairs
        return Differing(
            {name: tensor for name, tensor in made.items() if not is_same(tensor, stored.get(name))}, pairs
        )


def is_same(tensor: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are of one dtype and shape, with the same numbers in them."""
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other)


@dataclass(frozen=True)
class TakeFromLibrary(Task):
    """A layer made of parts from a library, written as any pruned layer."""

    results: ClassVar[int] = 2

    index: int
    chosen: Chosen

    def run(self, worker: LayerWorker) -> tuple[Finished, Report]:
        clock = Stopwatch()
        layer = self.chosen.layer(worker, self.index, worker.read_layer(self.index))
        clock.lap("read")
        return worker.finish(self.index, layer), Report(clock.laps, [])
