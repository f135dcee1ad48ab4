"""Tasks before any work: reading every weight once, and the proof that layers are understood."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.task import Task
from distprune.errors import InputError
from distprune.layers.module import build_from_state

#: Of the hidden states that both layers get.
SAMPLES, LENGTH = 2, 16


@dataclass(frozen=True)
class CheckLayer(Task):
    """Read a layer's weights and see that they are finite numbers.

    Raises:
        InputError: a weight is NaN or infinite; names the tensor and file.
    """

    index: int

    def run(self, worker: LayerWorker) -> None:
        worker.model.check_layer_finite(self.index)


@dataclass(frozen=True)
class CheckOuter(Task):
    """The same for the tensors outside the decoder layers."""

    def run(self, worker: LayerWorker) -> None:
        worker.model.check_outer_finite()


@dataclass(frozen=True)
class ProveLayer(Task):
    """See that a layer rebuilt from its parts gives the same bits as its family's class with the weights as they are.

    Raises:
        InputError: it doesn't; names the family.
    """

    index: int

    def run(self, worker: LayerWorker) -> None:
        runner, architecture = worker.runner, worker.architecture
        generator = torch.Generator().manual_seed(self.index)
        states = torch.randn(SAMPLES, LENGTH, architecture.hidden_size, generator=generator)
        states = states.to(worker.device, runner.dtype)
        state = worker.model.read_state(self.index)
        placed = {name: tensor.to(worker.device, runner.dtype) for name, tensor in state.items()}
        with torch.no_grad():
            original = build_from_state(architecture, self.index, placed)
            wanted = runner.forward(original, self.index, states)
            rebuilt = runner.build(architecture.layer_from_state(self.index, state), self.index, runner.dtype)
            got = runner.forward(rebuilt, self.index, states)
        # NaN is equal to NaN here: weights that are not finite are told of by their own check.
        if not torch.equal(torch.nan_to_num(got), torch.nan_to_num(wanted)):
            raise InputError(
                f"model_type '{architecture.config.model_type}': layer {self.index}, rebuilt from the parts that "
                "distprune knows, gives another output than the original, so the model can't be pruned. "
                "docs/families.md says how to describe a family."
            )
