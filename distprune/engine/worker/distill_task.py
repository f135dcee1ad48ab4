"""The task that distills one layer alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from distprune.checks import check_solution
from distprune.distillation.layerwise import Batch, DistillationReport, distill
from distprune.engine.worker.layer_worker import Finished, LayerWorker
from distprune.engine.worker.task import Task
from distprune.layers.parts import DecoderLayer


@dataclass(frozen=True)
class Distill(Task):
    """The pruned layer after learning to do what the dense layer does, and how that went.

    Attributes:
        index: the layer.
        student: the pruned layer.
        inputs: the dense model's hidden states at its input.
        outputs: at its output.
        ahead: at the output of the last layer that is looked ahead to.
    """

    results: ClassVar[int] = 2
    index: int
    student: DecoderLayer
    inputs: Tensor
    outputs: Tensor
    ahead: Tensor

    def run(self, worker: LayerWorker) -> tuple[Finished, DistillationReport]:
        options = worker.config.distill
        end = options.end_of_look_ahead(self.index, worker.architecture.num_layers)
        following = [worker.read_layer(number) for number in range(self.index + 1, end)]
        samples = Batch(self.inputs, self.outputs, self.ahead)
        learnt, report = distill(self.student, self.index, following, samples, worker.runner, options)
        check_solution(learnt, self.index)
        return worker.finish(self.index, learnt), report
