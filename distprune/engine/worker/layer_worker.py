"""What the tasks on one worker share: a device, the open model, and what a task has begun and another continues."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from distprune.checkpoint import PartFolder, WrittenFile
from distprune.config import PruneConfig
from distprune.engine.worker.dense_model import DenseModel
from distprune.layers.expert_chunks import ExpertChunks
from distprune.layers.loss import LossHead
from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods import make_method
from distprune.methods.gated import GatedMethod
from distprune.statistics import Moment

Opened = TypeVar("Opened")
#: Tensors by their names on disk, or the file that they were written to.
Piece = Mapping[str, Tensor] | WrittenFile


class ForgottenError(Exception):
    """A worker is asked to continue what it never began: it is a new process in the place of a lost one."""


class Folder(Protocol):
    """Where the whole model comes from, for the one task that needs it."""

    def whole_folder(self) -> AbstractContextManager[Path]:
        """A folder with the whole model."""


@dataclass(frozen=True)
class Finished:
    """A finished layer.

    Attributes:
        written: its tensors by their names on disk, or the file that a worker has written them to; or several of
            those, of which the first dimensions of what has the same name are to be joined.
        rotary_pairs: those that each KV group has kept, (g, p/2); None where all are there. No tensor of the result
            says so: its configuration does.
    """

    written: Piece | Sequence[Piece]
    rotary_pairs: Tensor | None


class LayerWorker:
    """Holds the open checkpoint, and no weights but those of what is open.

    Layers run on ``device`` in the configuration's dtype, which the driver has settled, and are solved on
    ``solve_device``, where their statistics are.

    Args:
        config: the run.
        model: the dense model.
        device: where layers run.
        parts: where finished layers go; None where the driver writes them.
        access: how this node comes by the whole model.
    """

    def __init__(
        self,
        config: PruneConfig,
        model: DenseModel,
        device: torch.device,
        parts: PartFolder | None = None,
        access: Folder | None = None,
    ):
        self.config, self.model, self.device, self.parts, self.access = config, model, device, parts, access
        self.architecture = model.architecture
        self.solve_device = torch.device("cpu") if config.offload else device
        self.method = make_method(config.method, config.options)
        self.runner = self._runner_of(config.micro_batch)
        self._open: object = None

    @cached_property
    def student_runner(self) -> LayerRunner:
        """Runs layers in the micro-batches of end-to-end distillation."""
        return self._runner_of(self.config.distill.micro_batch(self.config.micro_batch))

    @cached_property
    def gate_runner(self) -> LayerRunner:
        """Runs layers in the micro-batches in which gates learn."""
        assert isinstance(self.method, GatedMethod)
        return self._runner_of(self.method.micro_batch(self.config.micro_batch))

    def _runner_of(self, micro_batch: int) -> LayerRunner:
        return LayerRunner(self.architecture, self.device, getattr(torch, self.config.dtype), micro_batch)

    @cached_property
    def has_gradient_pass(self) -> bool:
        """Whether the method asks for the loss's gradients, of any layer."""
        return any(self.method.gradient_moments(shape) for shape in self.architecture.dense_shapes)

    # ---------------------------------------------------------------- what is open

    def open(self, opened: object) -> None:
        """Hold what a task begins with, in place of whatever was held."""
        self._open = opened

    def opened(self, kind: type[Opened]) -> Opened:
        """What was begun.

        Raises:
            ForgottenError: it was not begun here.
        """
        if not isinstance(self._open, kind):
            raise ForgottenError(f"no {kind.__name__} is open here")
        return self._open

    def close(self) -> None:
        """Give up what is open."""
        self._open = None

    # ---------------------------------------------------------------- weights

    def read_layer(self, index: int) -> DecoderLayer:
        """A layer of the dense model, on the CPU, without its experts where :meth:`chunks` read them. What is open is
        given up for it."""
        self.close()
        return self.model.read_layer(index) if self.chunks(index) is None else self.model.read_frame(index)

    def chunks(self, index: int) -> ExpertChunks | None:
        """How a layer's experts are read, where they are read a chunk at a time."""
        at_once = self.config.experts_at_once
        if at_once is None or not isinstance(self.architecture.dense_shape(index).ffn, ExpertsShape):
            return None
        return ExpertChunks(self.architecture.names(index), partial(self.model.read_chosen, index), at_once)

    def finish(self, index: int, layer: DecoderLayer) -> Finished:
        """Write a layer, see :meth:`write`."""
        pairs = None if layer.attention is None else layer.attention.rotary_pairs
        return Finished(self.write(self.model.to_disk(index, layer.to("cpu"))), pairs)

    def write(self, tensors: dict[str, Tensor]) -> dict[str, Tensor] | WrittenFile:
        """Write tensors to the folder of parts, where this node sees it; else the driver gets them as they are."""
        return tensors if self.parts is None else self.parts.write(tensors)

    def moments_beside_gradients(self, shape: LayerShape) -> Sequence[Moment]:
        """Moments for the profile of a layer that are collected in the gradient pass."""
        return *self.method.dense_moments(shape), *self.method.gradient_moments(shape)

    def carried_moments(self, index: int, shape: LayerShape) -> Sequence[Moment]:
        """Moments of a layer that is pruned on what it sees in the dense pass."""
        begins_block = index % self.config.block_length(self.architecture.num_layers) == 0
        return self.method.carried_moments(shape) if begins_block else ()

    # ---------------------------------------------------------------- what surrounds the layers

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids (samples, length) -> the hidden states at the first layer's input, (samples, length, d).

        No embeddings are read but those of these tokens.
        """
        ids, places = tokens.long().unique(return_inverse=True)
        rows = self.model.read_rows(self.architecture.embedding_name, ids)
        self.runner.shell.fill(self._small_tensors)
        batches = places.split(self.config.micro_batch)
        return torch.cat([self.runner.shell.embed(rows, batch).cpu() for batch in batches])

    def loss_head(self, runner: LayerRunner) -> LossHead:
        """What follows the last layer, in the dtype for gradients, until :meth:`drop_head`."""
        head = self.model.read_outer([self.architecture.head_name])
        runner.shell.fill(self._small_tensors | head, runner.gradient_dtype)
        return LossHead(runner)

    def drop_head(self, runner: LayerRunner) -> None:
        """Free the head's memory."""
        runner.shell.empty([self.architecture.head_name])

    @cached_property
    def _small_tensors(self) -> dict[str, Tensor]:
        """The tensors outside the layers but embedding and head: final norm, learned positions, projections."""
        large = {self.architecture.embedding_name, self.architecture.head_name}
        return self.model.read_outer(name for name in self.architecture.outer_tensors() if name not in large)


def moved(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Named tensors on a device."""
    return {name: tensor.to(device) for name, tensor in tensors.items()}
