"""Tasks of the passes through a pruned model, which tell what a further round of pruning goes by.

Of its layers the gradients are taken, and in their places the dense layers are observed: on what the pruned ones
before give them, and with the gradient at what they would give.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.open_layers import OpenLayer
from distprune.engine.worker.pass_tasks import OpenBackward, OpenForward, OpenHead
from distprune.engine.worker.task import Task
from distprune.layers.parts import DecoderLayer


@dataclass
class OpenPlace(OpenLayer):
    """A dense layer that is observed in the place of a pruned one.

    Attributes:
        pruned: the layer that gradients pass.
    """

    pruned: DecoderLayer | None = None

    def backward(self, worker: LayerWorker, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        super().backward(worker, hidden_states, gradient)
        assert self.pruned is not None
        return worker.runner.backward(self.pruned, self.index, hidden_states, gradient)


@dataclass(frozen=True)
class OpenPruned(OpenForward):
    """Begin the forward pass of a pruned layer, which :class:`Sweep` continues and :class:`CloseLayer` ends."""

    pruned: DecoderLayer

    def run(self, worker: LayerWorker) -> None:
        worker.close()
        layer = self.pruned.to(worker.device)
        worker.open(OpenLayer(self.index, layer, worker.method, worker.solve_device, profiled=None))


@dataclass(frozen=True)
class OpenPlaceOfPruned(OpenBackward):
    """Begin the gradient pass at a pruned layer, which :class:`Backward` continues and :class:`CloseLayer` ends."""

    pruned: DecoderLayer

    def run(self, worker: LayerWorker) -> None:
        layer = worker.read_layer(self.index).to(worker.device)
        moments, pruned = worker.moments_beside_gradients(layer.shape), self.pruned.to(worker.device)
        worker.open(OpenPlace(self.index, layer, worker.method, worker.solve_device, moments, pruned=pruned))


@dataclass(frozen=True)
class SampledGradient(Task):
    """The gradient at a pruned model's end for one piece of the samples; the pieces come in their order.

    Of each sample it is noted how far the predictions diverge from the dense model's.

    Attributes:
        hidden_states: at the pruned model's end.
        dense: at the dense model's.
        first: the number of the first of these samples.

    Raises:
        ForgottenError: the head is not open here.
    """

    hidden_states: Tensor
    dense: Tensor
    first: int

    def run(self, worker: LayerWorker) -> Tensor:
        opened = worker.opened(OpenHead)
        gradient, divergences = opened.head.sampled(self.hidden_states, self.dense, self.first)
        opened.losses.append(divergences)
        return gradient
