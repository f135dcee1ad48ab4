"""What a worker does with one layer: pure functions of checkpoint, input hidden states and configuration.

Because they are pure, any worker may run any of them, twice or again after a crash, and give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distprune.backward import backward
from distprune.calibration import CalibrationMetadata, draw_calibration
from distprune.checks import check_solution, solving
from distprune.config import PruneConfig
from distprune.decoder_layer import DecoderLayer, LayerShape, stored_like
from distprune.distillation.layerwise import Batch, DistillationReport, distill
from distprune.engine.worker.report import Report, Stopwatch, convergence_warnings
from distprune.engine.worker.weights import Model
from distprune.forward import LayerRunner
from distprune.loss import LossHead
from distprune.methods import Profile, make_method
from distprune.statistics import LayerStatistics, Moment, taps_of


@dataclass(frozen=True)
class PrunedLayer:
    """A layer after pruning: its tensors in the dtypes of the checkpoint's, and what reaches the next layer."""

    layer: DecoderLayer
    output: Tensor | None
    report: Report


class ForgottenError(Exception):
    """A worker is asked to go on with what it never began: it is a new process in the place of a lost one."""


@dataclass
class OpenLayer:
    """A dense layer in the dense pass, or the gradient pass: what was seen of how many pieces of the samples.

    ``profiled`` are the moments for its profile; None where it gets none in this pass. ``carried`` are those that go
    to its pruning.
    """

    index: int
    layer: DecoderLayer
    solve_device: torch.device
    profiled: Sequence[Moment] | None
    carried: Sequence[Moment] = ()
    pieces: int = 0

    def __post_init__(self):
        self.moments = *(self.profiled or ()), *self.carried
        self.statistics = LayerStatistics(self.moments, self.solve_device)

    @property
    def observation(self) -> dict[str, Any]:
        """What a runner is told to observe."""
        return {"observe": self.statistics.update, "taps": taps_of(self.moments)} if self.moments else {}


@dataclass
class OpenHead:
    """The model's end in the gradient pass, and the losses of the samples so far."""

    head: LossHead
    losses: list[Tensor] = field(default_factory=list)


class LayerTasks:
    """The tasks of one run on one device. Holds the open checkpoint, and no weights but those of its open layer.

    Layers run on ``device`` in the configuration's dtype, which the driver has settled, and are solved on
    ``solve_device``, where their statistics are.
    """

    def __init__(self, config: PruneConfig, model: Model, device: torch.device):
        self.config, self.device = config, device
        self.solve_device = torch.device("cpu") if config.offload else device
        self.family, self.dense, self.checkpoint = model.family, model.dense, model.checkpoint
        self.method = make_method(config.method, config.options)
        self.runner = LayerRunner(self.dense, device, getattr(torch, config.dtype), config.micro_batch)
        self._open: OpenLayer | OpenHead | None = None

    def check_layer(self, index: int) -> None:
        """Read a layer's weights and see that they are finite numbers.

        Raises:
            InputError: a weight is NaN or infinite; names the tensor and file.
        """
        self.checkpoint.check_finite(self.family.layer_shapes(self.dense, index))

    def check_outer(self) -> None:
        """The same for the tensors outside the decoder layers."""
        self.checkpoint.check_finite(self.family.outer_shapes(self.dense))

    def own_samples(self, folder: Path) -> tuple[np.ndarray, CalibrationMetadata]:
        """The calibration set that the whole model writes, spread over GPU, host memory and disk if large.

        Args:
            folder: holds the whole model.
        """
        return draw_calibration(
            folder,
            samples=self.config.samples,
            sequence_length=self.config.sequence_length,
            seed=self.config.seed,
            device=self.device.type,
            dtype=self.runner.dtype,
            trust_remote_code=self.config.trust_remote_code,
        )

    def embed(self, tokens: np.ndarray) -> Tensor:
        """Token ids (samples, length) -> the hidden states at the first layer's input, (samples, length, d)."""
        ids, positions = torch.from_numpy(tokens.astype("int64")).unique(return_inverse=True)
        rows = self.checkpoint.read_rows(self.family.embedding, ids)
        return rows.to(self.runner.dtype)[positions]

    def open_layer(self, index: int) -> None:
        """Begin the dense pass of a layer, which :meth:`sweep` goes on with and :meth:`profile` ends."""
        layer = self.read_layer(index).to(self.device)
        # Where there is a gradient pass, it collects all that the profile needs.
        moments = None if self.method.gradient_moments(layer.shape) else self.method.dense_moments(layer.shape)
        self._open = OpenLayer(index, layer, self.solve_device, moments, self._carried_moments(index, layer.shape))

    def sweep(self, index: int, piece: int, hidden_states: Tensor) -> Tensor:
        """The open layer's output hidden states for one piece of the samples; the pieces come in their order.

        Raises:
            ForgottenError: the layer is not open here.
            InputError: the model's activations exceed the range of the dtype.
        """
        opened = self._opened(index, piece)
        output = self.runner.run(opened.layer, index, hidden_states, **opened.observation)
        opened.pieces += 1
        return output

    def profile(self, index: int, pieces: int) -> tuple[Profile, dict[str, Tensor]]:
        """What the method wants to remember of the open layer, which has seen all ``pieces``.

        Returns:
            The profile, which planning looks at, empty if the gradient pass makes it; and, from the dense pass and if
            the layer begins a block, what its pruning will need of what was seen.

        Raises:
            ForgottenError: the layer is not open here.
        """
        opened, self._open = self._opened(index, pieces), None
        layer = opened.layer.to(self.solve_device)
        with solving(self.method.name, index):
            profile = {} if opened.profiled is None else self.method.profile(layer, opened.statistics)
        carried = opened.statistics.to_tensors(opened.carried)
        return moved(profile, "cpu"), moved(carried, "cpu")

    def _carried_moments(self, index: int, shape: LayerShape) -> Sequence[Moment]:
        """Those of a layer that is pruned on what it sees in the dense pass."""
        begins_block = index % self.config.block_length(self.dense.num_hidden_layers) == 0
        return self.method.carried_moments(shape) if begins_block else ()

    def _opened(self, index: int, pieces: int) -> OpenLayer:
        opened = self._open
        if not isinstance(opened, OpenLayer) or (opened.index, opened.pieces) != (index, pieces):
            raise ForgottenError(f"layer {index} is not open here with {pieces} pieces seen")
        return opened

    def open_head(self) -> None:
        """Begin the gradient pass at the model's end; :meth:`loss_gradient` goes on with it, :meth:`losses` ends it."""
        self._open = None
        self._open = OpenHead(self.loss_head(self.runner))

    def loss_head(self, runner: LayerRunner) -> LossHead:
        """What follows the last layer."""
        names = self.family.final_norm, self.family.head_of(self.dense)
        tensors = self.checkpoint.read(names)
        norm, weight = (tensors[name].to(self.device) for name in names)
        return LossHead(norm, weight, runner)

    def loss_gradient(self, hidden_states: Tensor, tokens: np.ndarray) -> Tensor:
        """The loss's gradient at the last layer's output for one piece of the samples; the pieces come in their order.

        Raises:
            ForgottenError: the head is not open here.
        """
        opened = self._opened_head()
        gradient, losses = opened.head.gradient(hidden_states, torch.from_numpy(tokens.astype("int64")))
        opened.losses.append(losses)
        return gradient

    def losses(self) -> Tensor:
        """Every sample's loss, (samples,), when all have been seen.

        Raises:
            ForgottenError: the head is not open here.
        """
        opened, self._open = self._opened_head(), None
        return torch.cat(opened.losses)

    def _opened_head(self) -> OpenHead:
        if not isinstance(self._open, OpenHead):
            raise ForgottenError("the model's end is not open here")
        return self._open

    def open_backward(self, index: int) -> None:
        """Begin the gradient pass of a layer, which :meth:`backward` goes on with and :meth:`profile` ends."""
        layer = self.read_layer(index).to(self.device)
        moments = (*self.method.dense_moments(layer.shape), *self.method.gradient_moments(layer.shape))
        self._open = OpenLayer(index, layer, self.solve_device, moments)

    def backward(self, index: int, piece: int, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient at the open layer's input for one piece of the samples; the pieces come in their order.

        Raises:
            ForgottenError: the layer is not open here.
            InputError: the gradients exceed the range of the dtype.
        """
        opened = self._opened(index, piece)
        result = backward(self.runner, opened.layer, index, hidden_states, gradient, **opened.observation)
        opened.pieces += 1
        return result

    def advance(self, index: int, hidden_states: Tensor) -> Tensor:
        """The dense layer's output hidden states.

        Raises:
            InputError: the model's activations exceed the range of the dtype.
        """
        return self.runner.run(self.read_layer(index), index, hidden_states)

    def prune(
        self,
        index: int,
        hidden_states: Tensor,
        planned: LayerShape,
        profile: Profile,
        carried: Mapping[str, Tensor],
        *,
        propagate: bool,
    ) -> PrunedLayer:
        """The layer pruned to the planned shape, and its output hidden states if the next layer needs them.

        Args:
            index: the layer.
            hidden_states: at its input.
            planned: its shape.
            profile: what the dense pass left of it.
            carried: what else it left, if these hidden states are the dense model's; else empty.
            propagate: whether the next layer needs the output.
        """

        def observe(variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
            statistics = LayerStatistics(moments, self.solve_device)
            self.runner.observe(variation, index, hidden_states, statistics.update, taps_of(moments))
            return statistics

        clock = Stopwatch()
        layer = self.read_layer(index)
        clock.lap("read")
        moments = self.method.pruning_moments(layer.shape, planned)
        statistics = LayerStatistics.from_tensors(moved(carried, self.solve_device), moments) or observe(layer, moments)
        clock.lap("statistics")
        profile = moved(profile, self.solve_device)
        with convergence_warnings() as warned, solving(self.method.name, index):
            pruned = self.method.prune(layer.to(self.solve_device), planned, statistics, profile, observe)
        if pruned.shape != planned:
            raise AssertionError(f"{self.method.name} gave layer {index} {pruned.shape}, planned {planned}")
        pruned = stored_like(pruned, layer)
        check_solution(pruned, index)
        clock.lap("solve")
        output = self.runner.run(pruned, index, hidden_states) if propagate else None
        clock.lap("propagate")
        return PrunedLayer(pruned.to("cpu"), output, Report(clock.laps, warned))

    def distill(self, index: int, layer: DecoderLayer, exercise: Batch) -> tuple[DecoderLayer, DistillationReport]:
        """The pruned layer after learning to do what the dense layer does, and how that went."""
        options = self.config.distill
        end = options.end_of_look_ahead(index, self.dense.num_hidden_layers)
        following = [self.read_layer(number) for number in range(index + 1, end)]
        learnt, lesson = distill(layer, index, following, exercise, self.runner, options)
        check_solution(learnt, index)
        return learnt.to("cpu"), lesson

    def read_layer(self, index: int) -> DecoderLayer:
        """A layer of the dense model, on the CPU."""
        self._open = None  # given up for whatever this is for
        tensors = self.checkpoint.read(self.family.layer_shapes(self.dense, index))
        return self.family.layer_from_checkpoint(tensors, self.dense, index)


def moved(tensors: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}
