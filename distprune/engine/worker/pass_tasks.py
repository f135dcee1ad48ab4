"""Tasks of the dense pass and the gradient pass, each piece of the samples in its turn."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from distprune.calibration import CalibrationMetadata, draw_calibration
from distprune.engine.worker.layer_worker import ForgottenError, LayerWorker, moved
from distprune.engine.worker.open_layers import OpenLayer, open_layer
from distprune.engine.worker.task import Task
from distprune.layers.loss import LossHead
from distprune.methods import Profile


def opened_layer(worker: LayerWorker, index: int, pieces: int) -> OpenLayer:
    """The layer that is open with so many pieces seen.

    Raises:
        ForgottenError: another one is, or none.
    """
    opened = worker.opened(OpenLayer)
    if (opened.index, opened.pieces) != (index, pieces):
        raise ForgottenError(f"layer {index} is not open here with {pieces} pieces seen")
    return opened


@dataclass
class OpenHead:
    """The model's end in the gradient pass, and the losses of the samples so far."""

    head: LossHead
    losses: list[Tensor] = field(default_factory=list)


# ---------------------------------------------------------------- before the first layer


@dataclass(frozen=True)
class WriteOwnSamples(Task):
    """The calibration set that the whole model writes, spread over GPU, host memory and disk if large."""

    results: ClassVar[int] = 2

    def run(self, worker: LayerWorker) -> tuple[Any, CalibrationMetadata]:
        config = worker.config
        with worker.access.whole_folder() as folder:
            return draw_calibration(
                folder,
                samples=config.samples,
                sequence_length=config.sequence_length,
                seed=config.seed,
                device=worker.device.type,
                dtype=worker.runner.dtype,
                trust_remote_code=config.trust_remote_code,
            )


@dataclass(frozen=True)
class Embed(Task):
    """Token ids (samples, length) -> the hidden states at the first layer's input, (samples, length, d)."""

    tokens: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        return worker.embed(self.tokens)


@dataclass(frozen=True)
class Advance(Task):
    """The dense layer's output hidden states, all its experts being in memory.

    Raises:
        InputError: the model's activations exceed the range of the dtype.
    """

    index: int
    hidden_states: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        worker.close()
        layer = worker.model.read_layer(self.index).to(worker.device)
        return worker.runner.run(layer, self.index, self.hidden_states)


# ---------------------------------------------------------------- the dense pass


@dataclass(frozen=True)
class OpenForward(Task):
    """Begin the dense pass of a layer, which :class:`Sweep` continues and :class:`CloseLayer` ends."""

    index: int

    def run(self, worker: LayerWorker) -> None:
        shape = worker.architecture.dense_shape(self.index)
        # Where there is a gradient pass, it collects all that the profile needs.
        moments = None if worker.has_gradient_pass else worker.method.dense_moments(shape)
        worker.open(open_layer(worker, self.index, moments, carries=True))


@dataclass(frozen=True)
class Sweep(Task):
    """The open layer's output hidden states for one piece of the samples; the pieces come in their order.

    Raises:
        ForgottenError: the layer is not open here.
        InputError: the model's activations exceed the range of the dtype.
    """

    index: int
    piece: int
    hidden_states: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        opened = opened_layer(worker, self.index, self.piece)
        output = opened.forward(worker, self.hidden_states)
        opened.pieces += 1
        return output


@dataclass(frozen=True)
class CloseLayer(Task):
    """What the method wants to remember of the open layer, which has seen all ``pieces``.

    It gives the profile, which planning looks at, empty if the gradient pass makes it; and, from the dense pass and if
    the layer begins a block, what its pruning will need of what was seen.

    Raises:
        ForgottenError: the layer is not open here.
    """

    results: ClassVar[int] = 2
    index: int
    pieces: int

    def run(self, worker: LayerWorker) -> tuple[Profile, dict[str, Tensor]]:
        opened = opened_layer(worker, self.index, self.pieces)
        worker.close()
        profile = opened.profile()
        carried = opened.statistics.to_tensors(opened.carried) if opened.carried else {}
        return moved(profile, "cpu"), moved(carried, "cpu")


# ---------------------------------------------------------------- the gradient pass


@dataclass(frozen=True)
class OpenLoss(Task):
    """Begin the gradient pass at the model's end; :class:`LossGradient` continues, :class:`CloseLoss` ends it."""

    def run(self, worker: LayerWorker) -> None:
        worker.close()
        worker.open(OpenHead(worker.loss_head(worker.runner)))


@dataclass(frozen=True)
class LossGradient(Task):
    """The loss's gradient at the last layer's output for one piece of the samples; the pieces come in their order.

    Raises:
        ForgottenError: the head is not open here.
    """

    hidden_states: Tensor
    tokens: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        opened = worker.opened(OpenHead)
        gradient, losses = opened.head.gradient(self.hidden_states, self.tokens.long())
        opened.losses.append(losses)
        return gradient


@dataclass(frozen=True)
class CloseLoss(Task):
    """Every sample's loss, (samples,), when all have been seen.

    Raises:
        ForgottenError: the head is not open here.
    """

    def run(self, worker: LayerWorker) -> Tensor:
        opened = worker.opened(OpenHead)
        worker.close()
        worker.drop_head(opened.head.runner)
        return torch.cat(opened.losses)


@dataclass(frozen=True)
class OpenBackward(Task):
    """Begin the gradient pass of a layer, which :class:`Backward` continues and :class:`CloseLayer` ends."""

    index: int

    def run(self, worker: LayerWorker) -> None:
        shape = worker.architecture.dense_shape(self.index)
        worker.open(open_layer(worker, self.index, worker.moments_beside_gradients(shape)))


@dataclass(frozen=True)
class Backward(Task):
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
        result = opened.backward(worker, self.hidden_states, self.gradient)
        opened.pieces += 1
        return result
