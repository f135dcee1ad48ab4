"""Tasks of end-to-end distillation, in which all pruned layers learn together what the dense model predicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from distprune.checks import check_gradient, check_hidden_states, check_solution
from distprune.distillation.logits import Student
from distprune.engine.worker.layer_worker import Finished, ForgottenError, LayerWorker
from distprune.engine.worker.task import Task
from distprune.layers.loss import LossHead
from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner


@dataclass
class OpenTeacher:
    """A dense layer between opening and closing, and how many pieces it has seen."""

    index: int
    runner: LayerRunner
    layer: DecoderLayer
    pieces: int = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.runner.run(self.layer, self.index, hidden_states)


@dataclass
class OpenStudentLayer:
    """A pruned layer that learns, between opening and closing, and how many pieces it has seen."""

    index: int
    student: Student
    pieces: int = 0

    def forward(self, hidden_states: Tensor) -> Tensor:
        output = self.student.forward(hidden_states)
        check_hidden_states(output, self.index)
        return output


@dataclass
class OpenDivergence:
    """The model's end, and what each sample diverges by so far."""

    head: LossHead
    divergences: list[Tensor] = field(default_factory=list)


def student_of(worker: LayerWorker, index: int, layer: DecoderLayer, learnt: Mapping[str, Tensor]) -> Student:
    """A pruned layer with what it has learnt."""
    return Student(layer, index, worker.student_runner, worker.config.distill, learnt)


def opened_layer(worker: LayerWorker, index: int, pieces: int) -> OpenTeacher | OpenStudentLayer:
    """The layer that is open with so many pieces seen.

    Raises:
        ForgottenError: another one is, or none.
    """
    opened = worker.opened(OpenTeacher | OpenStudentLayer)
    if (opened.index, opened.pieces) != (index, pieces):
        raise ForgottenError(f"layer {index} is not open here with {pieces} pieces seen")
    return opened


@dataclass(frozen=True)
class OpenDense(Task):
    """Begin with a layer of the dense model, which :class:`Forward` continues and :class:`Leave` ends."""

    index: int

    def run(self, worker: LayerWorker) -> None:
        layer = worker.read_layer(self.index).to(worker.device)
        worker.open(OpenTeacher(self.index, worker.student_runner, layer))


@dataclass(frozen=True)
class OpenStudent(Task):
    """Begin with a pruned layer and what it has learnt.

    For its forward pass it continues as a dense one does, for its backward pass with :class:`Learn`, which
    :class:`StepOptimizer` ends.
    """

    index: int
    student: DecoderLayer
    learnt: Mapping[str, Tensor]

    def run(self, worker: LayerWorker) -> None:
        worker.close()
        worker.open(OpenStudentLayer(self.index, student_of(worker, self.index, self.student, self.learnt)))


@dataclass(frozen=True)
class Forward(Task):
    """Output hidden states for one piece of the samples; the pieces come in their order.

    Raises:
        ForgottenError: the layer is not open here.
        InputError: activations exceed the range of the dtype.
    """

    index: int
    piece: int
    hidden_states: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        opened = opened_layer(worker, self.index, self.piece)
        output = opened.forward(self.hidden_states)
        opened.pieces += 1
        return output


@dataclass(frozen=True)
class Leave(Task):
    """All pieces have been seen."""

    index: int
    pieces: int

    def run(self, worker: LayerWorker) -> None:
        opened_layer(worker, self.index, self.pieces)
        worker.close()


@dataclass(frozen=True)
class OpenEnd(Task):
    """Begin at the model's end; :class:`Diverge` continues, :class:`CloseEnd` ends it."""

    def run(self, worker: LayerWorker) -> None:
        worker.close()
        worker.open(OpenDivergence(worker.loss_head(worker.runner)))


@dataclass(frozen=True)
class Diverge(Task):
    """The divergence's gradient at the last layer's output, for one piece of the samples.

    Raises:
        ForgottenError: the model's end is not open here.
    """

    hidden_states: Tensor
    dense: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        opened = worker.opened(OpenDivergence)
        gradient, divergences = opened.head.divergence(self.hidden_states, self.dense)
        opened.divergences.append(divergences)
        return gradient


@dataclass(frozen=True)
class CloseEnd(Task):
    """Every sample's divergence, (samples,) in nats, when all have been seen."""

    def run(self, worker: LayerWorker) -> Tensor:
        opened = worker.opened(OpenDivergence)
        worker.close()
        worker.drop_head(opened.head.runner)
        return torch.cat(opened.divergences)


@dataclass(frozen=True)
class Learn(Task):
    """The loss's gradient at the open layer's input for one piece of the samples; the pieces come in their order.

    Raises:
        ForgottenError: the layer is not open here.
        InputError: the gradients exceed the range of the dtype.
    """

    index: int
    piece: int
    hidden_states: Tensor
    gradient: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        opened = opened_layer(worker, self.index, self.piece)
        result = opened.student.backward(self.hidden_states, self.gradient)
        check_gradient(result, f"layer {self.index}")
        opened.pieces += 1
        return result


@dataclass(frozen=True)
class StepOptimizer(Task):
    """What the open layer has learnt after one more step at that learning rate."""

    index: int
    pieces: int
    rate: float

    def run(self, worker: LayerWorker) -> dict[str, Tensor]:
        opened = opened_layer(worker, self.index, self.pieces)
        worker.close()
        return {name: value.cpu() for name, value in opened.student.step(self.rate).items()}


@dataclass(frozen=True)
class FoldIn(Task):
    """The pruned layer with what it has learnt folded in."""

    index: int
    student: DecoderLayer
    learnt: Mapping[str, Tensor]

    def run(self, worker: LayerWorker) -> Finished:
        layer = self.student
        if self.learnt:
            layer = student_of(worker, self.index, self.student, self.learnt).layer()
        check_solution(layer, self.index)
        return worker.finish(self.index, layer)
