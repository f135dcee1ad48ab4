"""The tasks that measure plans: variations of single layers, each run through the layers after it as they are planned.

Hidden states are (samples, variants, length, d): the plan's own come first, then those of every variation of the layers
so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.library_tasks import Chosen
from distprune.engine.worker.open_layers import OpenLayer
from distprune.engine.worker.pass_tasks import OpenHead
from distprune.engine.worker.task import Task
from distprune.layers.parts import DecoderLayer


@dataclass
class OpenVariations(OpenLayer):
    """A planned layer, and what else it may be.

    Attributes:
        others: the variations.
    """

    others: Sequence[DecoderLayer] = ()

    def forward(self, worker: LayerWorker, hidden_states: Tensor) -> Tensor:
        """What each of the variants gives; those of this layer see what the plan's own do."""
        samples = len(hidden_states)
        given = hidden_states.flatten(0, 1)
        own = worker.runner.run(self.layer, self.index, given).unflatten(0, (samples, -1))
        first = hidden_states[:, 0].contiguous()
        others = [worker.runner.run(other, self.index, first)[:, None] for other in self.others]
        return torch.cat([own, *others], dim=1)


@dataclass(frozen=True)
class OpenPlanned(Task):
    """Begin to measure at a layer, which :class:`Sweep` continues and :class:`CloseLayer` ends.

    Attributes:
        index: the layer.
        planned: what it is in the plan.
        others: what else it may be.
    """

    index: int
    planned: Chosen
    others: Sequence[Chosen]

    def run(self, worker: LayerWorker) -> None:
        worker.close()
        dense = worker.read_layer(self.index)
        layer, *others = (
            chosen.layer(worker, self.index, dense).to(worker.device) for chosen in (self.planned, *self.others)
        )
        worker.open(OpenVariations(self.index, layer, worker.method, worker.solve_device, profiled=None, others=others))


@dataclass(frozen=True)
class Divergence(Task):
    """How far the variants' predictions are from the dense model's, for one piece of the samples, in their order.

    Attributes:
        hidden_states: at the end of the variants, (samples, variants, length, d).
        dense: at the dense model's, (samples, length, d).

    Raises:
        ForgottenError: the head is not open here.
    """

    hidden_states: Tensor
    dense: Tensor

    def run(self, worker: LayerWorker) -> Tensor:
        opened = worker.opened(OpenHead)
        opened.losses.append(opened.head.divergences(self.hidden_states, self.dense))
        return torch.zeros(())
