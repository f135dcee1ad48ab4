"""The task that prunes a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distprune.checks import check_solution, solving
from distprune.engine.worker.layer_worker import Finished, LayerWorker, moved
from distprune.engine.worker.report import Report, Stopwatch, convergence_warnings
from distprune.engine.worker.task import Task
from distprune.layers.names import stored_like
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods import LayerToPrune, Profile
from distprune.statistics import LayerStatistics, Moment, sites_of


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
        layer = worker.read_layer(self.index)
        clock.lap("read")
        statistics = self._statistics(worker, layer)
        clock.lap("statistics")
        with convergence_warnings() as warned, solving(worker.method.name, self.index):
            pruned = self._prune(worker, layer, statistics)
        clock.lap("solve")
        output = worker.runner.run(pruned, self.index, self.hidden_states) if self.propagates else None
        clock.lap("propagate")
        return worker.finish(self.index, pruned), output, Report(clock.laps, warned)

    def _statistics(self, worker: LayerWorker, layer: DecoderLayer) -> LayerStatistics:
        """Those that were carried from the dense pass, if they are all that is asked for."""
        moments = worker.method.pruning_moments(layer.shape, self.planned)
        carried = moved(self.carried, worker.solve_device)
        return LayerStatistics.from_tensors(carried, moments) or self._observe(worker, layer, moments)

    def _observe(self, worker: LayerWorker, layer: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        statistics = LayerStatistics(moments, worker.solve_device)
        worker.runner.observe(layer, self.index, self.hidden_states, statistics.update, sites_of(moments))
        return statistics

    def _prune(self, worker: LayerWorker, layer: DecoderLayer, statistics: LayerStatistics) -> DecoderLayer:
        """The layer in its planned shape, its tensors in the dtypes of the checkpoint's."""
        if layer.attention is None and layer.ffn is None:  # nothing of it is known
            return layer
        given = LayerToPrune(
            index=self.index,
            layer=layer.to(worker.solve_device),
            planned=self.planned,
            statistics=statistics,
            profile=moved(self.profile, worker.solve_device),
            observe=lambda variation, moments: self._observe(worker, variation, moments),
        )
        pruned = worker.method.prune(given)
        if pruned.shape != self.planned:
            raise AssertionError(f"{worker.method.name} gave layer {self.index} {pruned.shape}, planned {self.planned}")
        pruned = stored_like(pruned, layer, worker.architecture.names(self.index))
        check_solution(pruned, self.index)
        return pruned
