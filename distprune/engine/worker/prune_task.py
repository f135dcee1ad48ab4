"""The task that prunes a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distprune.checks import solving
from distprune.engine.worker.layer_pruning import LayerPruning, pruning_of
from distprune.engine.worker.layer_worker import Finished, LayerWorker, moved
from distprune.engine.worker.report import Report, Stopwatch, convergence_warnings
from distprune.engine.worker.task import Task
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods import Profile
from distprune.statistics import LayerStatistics


@dataclass(frozen=True)
class Prune(Task):
    """The layer pruned to its planned shape, and its output hidden states if the next layer needs them.

    Attributes:
        index: the layer.
        hidden_states: at its input.
        planned: its shape.
        profile: what the dense pass left of it.
        carried: what else it left, if these hidden states are the dense model's; else empty.
        propagates: whether the next layer needs the output.
    """

    results: ClassVar[int] = 3
    index: int
    hidden_states: Tensor
    planned: LayerShape
    profile: Profile
    carried: Mapping[str, Tensor]
    propagates: bool

    def run(self, worker: LayerWorker) -> tuple[Finished, Tensor | None, Report]:
        clock = Stopwatch()
        with pruning_of(worker, self.index, self.planned, self.hidden_states, self.propagates) as pruning:
            clock.lap("read")
            statistics = self._statistics(worker, pruning)
            clock.lap("statistics")
            with convergence_warnings() as warned, solving(worker.method.name, self.index):
                pruned = self._prune(worker, pruning, statistics)
            clock.lap("solve")
            output = pruning.output(pruned) if self.propagates else None
            clock.lap("propagate")
            finished = pruning.finish(pruned)
        return finished, output, Report(clock.laps, warned)

    def _statistics(self, worker: LayerWorker, pruning: LayerPruning) -> LayerStatistics:
        """Those that were carried from the dense pass, if they are all that is asked for."""
        moments = worker.method.pruning_moments(pruning.layer.shape, self.planned)
        carried = moved(self.carried, worker.solve_device)
        return LayerStatistics.from_tensors(carried, moments) or pruning.observe(pruning.layer, moments)

    def _prune(self, worker: LayerWorker, pruning: LayerPruning, statistics: LayerStatistics) -> DecoderLayer:
        """The layer in its planned shape, its tensors in the dtypes of the checkpoint's."""
        layer = pruning.layer
        if layer.attention is None and layer.ffn is None:  # nothing of it is known
            return layer
        profile = moved(self.profile, worker.solve_device)
        pruned = worker.method.prune(pruning.to_prune(statistics=statistics, profile=profile))
        if pruned.shape != self.planned:
            raise AssertionError(f"{worker.method.name} gave layer {self.index} {pruned.shape}, planned {self.planned}")
        return pruning.stored(pruned)
