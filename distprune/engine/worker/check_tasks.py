"""Tasks before any work: reading every weight once, and the proof that layers are understood."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil

import torch
from torch import Tensor

from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.task import Task
from distprune.errors import InputError
from distprune.layers.chunked_pass import ChunkedPass
from distprune.layers.expert_chunks import ExpertChunks
from distprune.layers.module import build_from_state
from distprune.layers.parts import Experts, keep_experts
from distprune.layers.shapes import ExpertsShape

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

    Of a layer whose experts are read a chunk at a time, one with as few experts as it can do with is run both ways,
    whole and in chunks, and gives the same up to rounding.

    Raises:
        InputError: it doesn't; names the family.
    """

    index: int

    def run(self, worker: LayerWorker) -> None:
        generator = torch.Generator().manual_seed(self.index)
        states = torch.randn(SAMPLES, LENGTH, worker.architecture.hidden_size, generator=generator)
        states = states.to(worker.device, worker.runner.dtype)
        chunks = worker.chunks(self.index)
        same = self._is_same(worker, states) if chunks is None else self._is_same_in_chunks(worker, states, chunks)
        if not same:
            model_type = worker.architecture.config.model_type
            raise InputError(
                f"model_type '{model_type}': layer {self.index}, rebuilt from the parts that "
                "distprune knows, gives another output than the original, so the model can't be pruned. "
                "docs/families.md says how to describe a family."
            )

    def _is_same(self, worker: LayerWorker, states: Tensor) -> bool:
        runner, architecture = worker.runner, worker.architecture
        state = worker.model.read_state(self.index)
        placed = {name: tensor.to(worker.device) for name, tensor in state.items()}
        with torch.no_grad():
            original = build_from_state(architecture, self.index, placed, runner.dtype)
            wanted = runner.forward(original, self.index, states)
            rebuilt = runner.build(architecture.layer_from_state(self.index, state), self.index, runner.dtype)
            got = runner.forward(rebuilt, self.index, states)
        # NaN is equal to NaN here: weights that are not finite are told of by their own check.
        return torch.equal(torch.nan_to_num(got), torch.nan_to_num(wanted))

    def _is_same_in_chunks(self, worker: LayerWorker, states: Tensor, chunks: ExpertChunks) -> bool:
        runner, frame = worker.runner, worker.model.read_frame(self.index)
        assert isinstance(frame.ffn, Experts)
        few = keep_experts(frame.ffn, fewest_experts(frame.ffn.shape))
        layer, count = replace(frame, ffn=few), few.shape.count
        with torch.no_grad():
            whole = replace(
                layer, ffn=replace(chunks.take(few, range(count)), shared=few.shared, shared_count=few.shared_count)
            )
            wanted = runner.forward(runner.build(whole, self.index, runner.dtype), self.index, states)
            del whole
            passing = ChunkedPass(runner, layer, self.index, states)
            passing.route()
            for own, experts in chunks.of(few):
                passing.add_outputs(own, passing.outputs(own, experts))
            got = passing.output()
        difference = torch.nan_to_num(got.double()) - torch.nan_to_num(wanted.double())
        tolerance = 4 * torch.finfo(runner.dtype).eps
        return bool(difference.norm() <= tolerance * torch.nan_to_num(wanted.double()).norm())


def fewest_experts(shape: ExpertsShape) -> Tensor:
    """The numbers of as few experts as the router can choose from, as many from each of its groups."""
    each = ceil(shape.fewest / shape.groups)
    return torch.arange(shape.count).unflatten(0, (shape.groups, -1))[:, :each].flatten()
