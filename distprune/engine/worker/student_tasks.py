"""What a worker does with one layer in end-to-end distillation: pure functions, as all its tasks are."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from distprune.checks import check_gradient, check_hidden_states, check_solution
from distprune.decoder_layer import DecoderLayer
from distprune.engine.worker.layer_worker import ForgottenError, LayerTasks
from distprune.forward import LayerRunner
from distprune.distillation.logits import Learnt, Student
from distprune.loss import LossHead


@dataclass
class OpenPupil:
    """A layer between opening and closing: the dense one, or a pruned one that learns. It has seen some pieces."""

    index: int
    taught: DecoderLayer | Student
    pieces: int = 0


@dataclass
class OpenEnd:
    """The model's end, and what each sample diverges by so far."""

    head: LossHead
    divergences: list[Tensor] = field(default_factory=list)


class Lessons:
    """These tasks of one run on one device, beside its others."""

    def __init__(self, tasks: LayerTasks):
        self._tasks, self._options = tasks, tasks.config.distill
        micro_batch = self._options.micro_batch(tasks.config.micro_batch)
        self._runner = LayerRunner(tasks.dense, tasks.device, tasks.runner.dtype, micro_batch)
        self._open: OpenPupil | OpenEnd | None = None

    def open_dense(self, index: int) -> None:
        """Begin with a layer of the dense model, which :meth:`listen` goes on with and :meth:`leave` ends."""
        self._open = OpenPupil(index, self._tasks.read_layer(index).to(self._tasks.device))

    def open_pupil(self, index: int, layer: DecoderLayer, learnt: Learnt) -> None:
        """Begin with a pruned layer and what it has learnt. For its forward pass it goes on as a dense one does, for
        its backward pass with :meth:`learn`, which :meth:`step` ends."""
        self._open = OpenPupil(index, Student(layer, index, self._runner, self._options, learnt))

    def listen(self, index: int, piece: int, hidden_states: Tensor) -> Tensor:
        """Output hidden states for one piece of the samples; the pieces come in their order.

        Raises:
            ForgottenError: the layer is not open here.
            InputError: activations exceed the range of the dtype.
        """
        opened = self._opened(index, piece)
        if isinstance(opened.taught, Student):
            output = opened.taught.forward(hidden_states)
            check_hidden_states(output, index)
        else:
            output = self._runner.run(opened.taught, index, hidden_states)
        opened.pieces += 1
        return output

    def leave(self, index: int, pieces: int) -> None:
        """All pieces have been seen."""
        self._opened(index, pieces)
        self._open = None

    def open_end(self) -> None:
        """Begin at the model's end; :meth:`diverge` goes on with it, :meth:`divergences` ends it."""
        self._open = OpenEnd(self._tasks.loss_head(self._runner))

    def diverge(self, hidden_states: Tensor, dense: Tensor) -> Tensor:
        """The divergence's gradient at the last layer's output, for one piece of the samples.

        Raises:
            ForgottenError: the model's end is not open here.
        """
        end = self._opened_end()
        gradient, divergences = end.head.divergence(hidden_states, dense)
        end.divergences.append(divergences)
        return gradient

    def divergences(self) -> Tensor:
        """Every sample's divergence, (samples,) in nats, when all have been seen."""
        end, self._open = self._opened_end(), None
        return torch.cat(end.divergences)

    def learn(self, index: int, piece: int, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient at the open layer's input for one piece of the samples; the pieces come in their order.

        Raises:
            ForgottenError: the layer is not open here.
            InputError: the gradients exceed the range of the dtype.
        """
        opened = self._opened(index, piece)
        result = opened.taught.backward(hidden_states, gradient)
        check_gradient(result, f"layer {index}")
        opened.pieces += 1
        return result

    def step(self, index: int, pieces: int, rate: float) -> dict[str, Tensor]:
        """What the open layer has learnt after one more step at that learning rate."""
        opened, self._open = self._opened(index, pieces), None
        return {name: value.cpu() for name, value in opened.taught.step(rate).items()}

    def graduate(self, index: int, layer: DecoderLayer, learnt: Learnt) -> DecoderLayer:
        """The pruned layer with what it has learnt folded in."""
        folded = Student(layer, index, self._runner, self._options, learnt).layer() if learnt else layer
        check_solution(folded, index)
        return folded.to("cpu")

    def _opened(self, index: int, pieces: int) -> OpenPupil:
        opened = self._open
        if not isinstance(opened, OpenPupil) or (opened.index, opened.pieces) != (index, pieces):
            raise ForgottenError(f"layer {index} is not open here with {pieces} pieces seen")
        return opened

    def _opened_end(self) -> OpenEnd:
        if not isinstance(self._open, OpenEnd):
            raise ForgottenError("the model's end is not open here")
        return self._open
