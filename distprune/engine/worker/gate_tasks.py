"""Tasks of a step in which gates learn: forward through the gated layers, and back with the gates' gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from distprune.engine.worker.layer_worker import LayerWorker, moved
from distprune.engine.worker.open_layers import OpenLayer
from distprune.engine.worker.pass_tasks import opened_layer
from distprune.engine.worker.task import Task
from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner
from distprune.methods import Profile
from distprune.methods.gated import GatedMethod


@dataclass
class OpenGatedLayer(OpenLayer):
    """A gated layer in one step.

    Attributes:
        ungated: the layer without the gates' values.
        names: of its gates.
    """

    ungated: DecoderLayer | None = None
    names: Collection[str] = ()

    def runner(self, worker: LayerWorker) -> LayerRunner:
        return worker.gate_runner


def open_gated(
    worker: LayerWorker, index: int, profile: Profile, gates: Mapping[str, Tensor], *, for_gradients: bool
) -> OpenGatedLayer:
    """Read a layer and put gates in it.

    Args:
        for_gradients: whether the gates' gradients are asked for.
    """
    method, device = gated_method(worker), worker.device
    dense = worker.read_layer(index).to(device)
    ungated = method.with_diagonals(dense, moved(profile, device), gates.keys())
    moments = method.gate_moments(dense.shape, gates.keys()) if for_gradients else ()
    layer = method.gated(ungated, moved(gates, device))
    own = {"ungated": ungated, "names": [*gates]}
    return OpenGatedLayer(index, layer, method, worker.solve_device, None, moments, **own)


def gated_method(worker: LayerWorker) -> GatedMethod:
    assert isinstance(worker.method, GatedMethod)
    return worker.method


@dataclass(frozen=True)
class OpenGated(Task):
    """Begin the forward pass of a gated layer, which ``Sweep`` continues and ``CloseLayer`` ends.

    Attributes:
        index: the layer.
        profile: what the dense pass left of it, without the gates.
        gates: their values, by name.
    """

    index: int
    profile: Profile
    gates: Mapping[str, Tensor]

    def run(self, worker: LayerWorker) -> None:
        worker.open(open_gated(worker, self.index, self.profile, self.gates, for_gradients=False))


@dataclass(frozen=True)
class OpenGatedBackward(OpenGated):
    """Begin the backward pass of a gated layer, which ``Backward`` continues and :class:`CloseGated` ends."""

    def run(self, worker: LayerWorker) -> None:
        worker.open(open_gated(worker, self.index, self.profile, self.gates, for_gradients=True))


@dataclass(frozen=True)
class CloseGated(Task):
    """The loss's gradient in every gate of the open layer, which has seen all ``pieces``.

    Raises:
        ForgottenError: the layer is not open here.
    """

    index: int
    pieces: int

    def run(self, worker: LayerWorker) -> dict[str, Tensor]:
        opened = opened_layer(worker, self.index, self.pieces)
        worker.close()
        assert isinstance(opened, OpenGatedLayer) and opened.ungated is not None
        layer = opened.ungated.to(worker.solve_device)
        return moved(gated_method(worker).gate_gradients(layer, opened.statistics, opened.names), "cpu")
