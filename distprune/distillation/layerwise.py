"""Layer-wise distillation: a pruned layer learns to give the dense layer's output, alone and on the dense inputs.

The last step of OOPS (Wei et al., Neural Networks 2026), and of use after any method. No layer's training needs
another's result, so layers train in any order and all at once.

Beyond the paper, a layer looks ahead: its output is also judged by what the dense layers that follow make of it, which
tells errors that matter from errors that don't.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.config import DistillConfig
from distprune.distillation.trainable import TrainableLayer, adam_w
from distprune.layers.determinism import deterministic_attention
from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner

# Points of the loss curve in a run's record.
CURVE_POINTS = 20
# At or below it, the squared norm of a token's hidden state is as good as zero.
NOTHING = 1e-12
# Layers with this loss or more learn at the full rate.
LARGE_LOSS = 0.04


@dataclass(frozen=True)
class DistillationReport:
    """How a layer's distillation went. Losses are the :func:`relative_error` of the layer's output, plus that of what
    the dense layers after it make of it; end to end, that of :mod:`distprune.distillation.logits`, one for all layers.

    Attributes:
        training: mean loss over equal stretches of the steps, in their order.
        held_out_before, held_out_after: loss on samples that nothing is trained on.
        kept: whether the layer was changed: only if the loss on held-out samples fell.
    """

    training: list[float]
    held_out_before: float
    held_out_after: float
    kept: bool


@dataclass(frozen=True)
class Batch:
    """What a layer learns from: hidden states of the dense model, (samples, length, d) each.

    Attributes:
        inputs: at the layer's input.
        outputs: at its output.
        ahead: at the output of the last layer that is looked ahead to; ``outputs`` where there is none.
    """

    inputs: Tensor
    outputs: Tensor
    ahead: Tensor

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, samples: Tensor | slice) -> Batch:
        return Batch(self.inputs[samples], self.outputs[samples], self.ahead[samples])

    def to(self, *args) -> Batch:
        return Batch(self.inputs.to(*args), self.outputs.to(*args), self.ahead.to(*args))


def distill(
    layer: DecoderLayer,
    index: int,
    following: Sequence[DecoderLayer],
    samples: Batch,
    runner: LayerRunner,
    options: DistillConfig,
) -> tuple[DecoderLayer, DistillationReport]:
    """Train a pruned layer to do what the dense layer does.

    Args:
        layer: the pruned layer; it may have low-rank factors and a linear branch, which train too.
        index: which layer of the model it is.
        following: the dense layers after it that judge its output; they stay as they are.
        samples: what it learns from.
        runner: what runs the layer, and on which device.
        options: epochs, learning rate and the like.

    Returns:
        The layer with its tensors in the given ones' dtypes, or as it was where its held-out loss did not fall.
    """
    student = Student(layer, index, following, runner, options)
    training, held_out = split(len(samples), options)
    before = student.mean_loss(samples[held_out])
    if not student.learns:  # no weights, nothing to learn
        return layer, DistillationReport([], before, before, kept=False)
    losses = student.train(samples[training], rate_for(before, options))
    after = student.mean_loss(samples[held_out])
    report = DistillationReport(averaged(losses, CURVE_POINTS), before, after, kept=after < before)
    return (student.layer() if report.kept else layer), report


class Student:
    """A pruned layer that trains, and the dense layers after it that judge its output."""

    def __init__(
        self,
        layer: DecoderLayer,
        index: int,
        following: Sequence[DecoderLayer],
        runner: LayerRunner,
        options: DistillConfig,
    ):
        self._runner, self._options = runner, options
        self._trainable = TrainableLayer(layer, index, runner, options)
        self._following = {
            number: runner.build(dense, number, runner.gradient_dtype).requires_grad_(False)
            for number, dense in enumerate(following, index + 1)
        }

    @property
    def learns(self) -> bool:
        """Whether it has weights to train."""
        return bool(self._trainable.parameters)

    def train(self, samples: Batch, learning_rate: float) -> list[float]:
        """Run the optimizer over all epochs, with this peak learning rate. Returns the loss of every step."""
        options, losses = self._options, []
        parameters = self._trainable.parameters.values()
        optimizer = adam_w(parameters, learning_rate)
        batches = list(shuffled_batches(len(samples), options))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warmup_and_cosine(len(batches)))
        for batch in batches:
            loss = self._loss(samples[batch])
            optimizer.zero_grad()
            with deterministic_attention():
                loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        return losses

    @torch.no_grad()
    def mean_loss(self, samples: Batch) -> float:
        size = self._options.batch
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        return sum(self._loss(batch).item() * len(batch) for batch in batches) / len(samples)

    def _loss(self, samples: Batch) -> Tensor:
        samples = samples.to(self._runner.device, self._runner.gradient_dtype)
        outputs = self._trainable.forward(samples.inputs)
        loss = relative_error(outputs, samples.outputs)
        if self._following:
            loss = loss + relative_error(self._look_ahead(outputs), samples.ahead)
        return loss

    def _look_ahead(self, hidden_states: Tensor) -> Tensor:
        """What the dense layers that follow make of a layer's output."""
        for index, module in self._following.items():
            hidden_states = self._runner.forward(module, index, hidden_states)
        return hidden_states

    def layer(self) -> DecoderLayer:
        """The layer as it is now."""
        return self._trainable.layer()


def rate_for(loss: float, options: DistillConfig) -> float:
    """The peak learning rate for a layer with this loss before it learns.

    AdamW's steps have a size of their own, so weights keep jittering by about the learning rate, which costs a loss of
    about its square. A layer that is nearly right would only get worse at the full rate.
    """
    return options.learning_rate * min(1.0, math.sqrt(loss / LARGE_LOSS))


def relative_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of ‖ŷ - y‖² / ‖y‖², (), from (.., d); of ‖ŷ - y‖² where y is as good as nothing.

    What follows a layer normalizes its input token by token, so an error counts relative to its token: a few tokens
    (the first of a text above all) have hidden states a thousand times larger than the others'.
    """
    outputs, targets = outputs.float(), targets.float()
    errors, powers = (outputs - targets).square().sum(dim=-1), targets.square().sum(dim=-1)
    return (errors / torch.where(powers > NOTHING, powers, 1.0)).mean()


def split(samples: int, options: DistillConfig) -> tuple[Tensor, Tensor]:
    """Indices of the samples to train on and of those held out, at least one each."""
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(options.seed))
    held_out = min(max(1, round(options.held_out * samples)), samples - 1)
    return order[held_out:], order[:held_out]


def shuffled_batches(samples: int, options: DistillConfig) -> Iterator[Tensor]:
    """The indices of every step's samples: each epoch takes all in an order of its own."""
    generator = torch.Generator().manual_seed(options.seed)
    for _ in range(options.epochs):
        yield from torch.randperm(samples, generator=generator).split(options.batch)


def warmup_and_cosine(steps: int) -> Callable[[int], float]:
    """The factor on the learning rate: up in the first twentieth of the steps, then down to zero as a cosine."""
    warmup = max(1, steps // 20)
    return lambda step: min(1.0, (step + 1) / warmup) * (1 + math.cos(math.pi * step / steps)) / 2


def averaged(losses: list[float], points: int) -> list[float]:
    """The means of at most ``points`` equal stretches."""
    return [stretch.mean().item() for stretch in torch.tensor(losses).tensor_split(min(points, len(losses)))]
