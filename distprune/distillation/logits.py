"""End-to-end distillation: all pruned layers together learn the predictions of the dense model.

The loss is the Kullback-Leibler divergence of the pruned model's predictions from the dense one's (Hinton et al., 2015,
at temperature 1). Its gradient goes back from layer to layer, so that a layer needs to know nothing of the others: a
step of the optimizer is a forward pass through all layers, the gradient at the model's end, and a backward pass in
which each layer learns as the gradient passes it.

By default low-rank updates learn (LoRA): so few parameters can hardly learn what the text is about, only to make up for
what has gone, and that serves other texts as well.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from distprune.config import DistillConfig
from distprune.distillation.trainable import TrainableLayer, adam_w
from distprune.layers.determinism import deterministic_attention
from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner

#: What AdamW knows of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
#: What a layer has learnt: its trained parameters and their moments by name; nothing at the beginning.
Learnt = Mapping[str, Tensor]


class Student:
    """A pruned layer in one step of the optimizer.

    Args:
        layer: as it was pruned.
        index: which layer of the model it is.
        runner: what runs it; its micro-batches fix the order in which gradients are summed.
        options: what of it trains.
        learnt: what the steps before have taught it.
    """

    def __init__(self, layer: DecoderLayer, index: int, runner: LayerRunner, options: DistillConfig, learnt: Learnt):
        self._runner, self._learnt = runner, learnt
        self._trainable = TrainableLayer(layer, index, runner, options)
        self._parameters = self._trainable.parameters
        if learnt:
            self._take_up(learnt)

    @torch.no_grad()
    def _take_up(self, learnt: Learnt) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(learnt[name])

    @torch.no_grad()
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Output hidden states for those at the input, (samples, length, d) each, in the dtype of gradients."""
        return torch.cat([self._trainable.forward(self._to_run(batch)) for batch in self._split(hidden_states)])

    def backward(self, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient at the input, for that at the output; what trains keeps its own for :meth:`step`."""
        at_input = []
        for batch, at_output in zip(self._split(hidden_states), self._split(gradient), strict=True):
            given = self._to_run(batch).requires_grad_()
            with torch.enable_grad():
                output = self._trainable.forward(given)
            with deterministic_attention():
                torch.autograd.backward(output, at_output.to(output))
            at_input.append(given.grad)
        return torch.cat(at_input)

    def _split(self, states: Tensor) -> tuple[Tensor, ...]:
        return states.split(self._runner.micro_batch)

    def _to_run(self, batch: Tensor) -> Tensor:
        # A copy, since what was made in inference mode has no gradients.
        return batch.to(self._runner.device, self._runner.gradient_dtype, copy=True)

    def step(self, rate: float) -> dict[str, Tensor]:
        """A step of AdamW at that learning rate, by the gradients that have passed. Returns what is learnt now."""
        if not self._parameters:  # no weights, nothing to learn
            return {}
        optimizer = adam_w(self._parameters.values(), rate)
        if self._learnt:
            for name, parameter in self._parameters.items():
                moments = {moment: self._learnt[f"{name}.{moment}"] for moment in MOMENTS}
                optimizer.state[parameter] = {
                    moment: value.to(parameter.device, copy=True) for moment, value in moments.items()
                }
        optimizer.step()
        learnt = {}
        for name, parameter in self._parameters.items():
            learnt[name] = parameter.detach()
            learnt |= {f"{name}.{moment}": optimizer.state[parameter][moment] for moment in MOMENTS}
        return learnt

    def layer(self) -> DecoderLayer:
        """The layer with what it has learnt folded in, in the dtype of the given one's tensors."""
        return self._trainable.layer()
