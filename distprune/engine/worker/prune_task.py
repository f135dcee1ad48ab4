"""The task that prunes a layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distprune.checks import solving
from distprune.engine.worker.layer_pruning import LayerPruning
from distprune.engine.worker.layer_worker import Finished, LayerWorker
from distprune.engine.worker.report import Report, Stopwatch, convergence_warnings
from distprune.engine.worker.task import Task
from distprune.layers.shapes import LayerShape
from distprune.methods import Profile


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
        dense_input, dense_output: the dense model's hidden states at its input, if these are other ones, and at its
            output, where the method aims at them.
    """

    results: ClassVar[int] = 3
    index: int
    hidden_states: Tensor
    planned: LayerShape
    profile: Profile
    carried: Mapping[str, Tensor]
    propagates: bool
    dense_input: Tensor | None = None
    dense_output: Tensor | None = None

    def run(self, worker: LayerWorker) -> tuple[Finished, Tensor | None, Report]:
        clock = Stopwatch()
        layer = worker.read_layer(self.index)
        dense = {"dense_input": self.dense_input, "dense_output": self.dense_output}
        pruning = LayerPruning(worker, self.index, layer, self.planned, self.hidden_states, **dense)
        clock.lap("read")
        statistics = pruning.statistics(self.carried)
        clock.lap("statistics")
        with convergence_warnings() as warned, solving(worker.method.name, self.index):
            pruned = pruning.prune(statistics, self.profile)
        clock.lap("solve")
        output = worker.runner.run(pruned, self.index, self.hidden_states) if self.propagates else None
        clock.lap("propagate")
        finished = worker.finish(self.index, pruned)
        return finished, output, Report(clock.laps, warned)
