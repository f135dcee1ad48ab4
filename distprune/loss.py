"""Losses at the model's end and their gradients: of every next token's cross-entropy, and of what a pruned model's
predictions differ from the dense one's.

Sums over tokens and not means, so that a token's gradients don't depend on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor

from distprune.checks import check_gradient
from distprune.forward import LayerRunner
from distprune.modeling import RMSNorm

# Tokens whose logits exist at once: a vocabulary is some ten times as wide as a layer.
TOKENS_AT_ONCE = 256


@dataclass(frozen=True)
class LossHead:
    """What follows the last layer.

    Args:
        norm: the final norm's weights, (d,).
        weight: of the language-model head, (vocabulary, d); the embedding where they are tied.
        runner: that of the layers, whose micro-batches, dtype for gradients and device are taken.
    """

    norm: Tensor
    weight: Tensor
    runner: LayerRunner

    def gradient(self, hidden_states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of the loss at the last layer's output.

        Args:
            hidden_states: at the last layer's output, (samples, length, d).
            tokens: their ids, (samples, length); the last of a sample is no input, and the first no target.

        Returns:
            The gradient, of ``hidden_states``' shape and on its device, in the runner's dtype for gradients; and each
            sample's loss in nats, (samples,) in float64 on the CPU.
        """
        norm, weight = self._norm(), self._weight()

        def of_output(output: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
            return of_head(output, weight, tokens[batch].to(self.runner.device))

        return self._through(norm, hidden_states, of_output)

    def divergence(self, hidden_states: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Of the Kullback-Leibler divergence of a pruned model's predictions from the dense model's.

        Args:
            hidden_states: at the pruned model's last layer's output, (samples, length, d).
            dense: at the dense model's.

        Returns:
            The gradient and each sample's divergence, as :meth:`gradient` gives them.
        """
        norm, weight = self._norm(), self._weight()

        def of_output(output: Tensor, batch: slice) -> tuple[Tensor, Tensor]:
            return of_divergence(output, weight, norm(dense[batch].to(output)))

        return self._through(norm, hidden_states, of_output)

    def _through(
        self, norm: RMSNorm, hidden_states: Tensor, of_output: Callable[[Tensor, slice], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """A gradient at the norm's output taken back to its input, a micro-batch at a time."""
        runner, dtype = self.runner, self.runner.gradient_dtype
        gradient = runner.empty_like(hidden_states, dtype)
        losses = torch.empty(len(hidden_states), dtype=torch.float64)
        for start in range(0, len(hidden_states), runner.micro_batch):
            batch = slice(start, start + runner.micro_batch)
            given = hidden_states[batch].to(runner.device, dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                output = norm(given)
            at_output, losses[batch] = of_output(output.detach(), batch)
            [at_input] = torch.autograd.grad(output, given, at_output)
            check_gradient(at_input, "the model's end")
            gradient[batch] = at_input
        return gradient, losses

    def _weight(self) -> Tensor:
        return self.weight.to(self.runner.device, self.runner.gradient_dtype)

    def _norm(self) -> RMSNorm:
        with init_empty_weights():
            norm = RMSNorm(len(self.norm), eps=self.runner.config.rms_norm_eps)
        norm.load_state_dict({"weight": self.norm.to(self.runner.device, self.runner.gradient_dtype)}, assign=True)
        return norm.requires_grad_(False)


@torch.no_grad()
def of_head(hidden_states: Tensor, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The loss's gradient at the head's input, (samples, length, d), and each sample's loss, (samples,) in float64.

    Some tokens at a time: their logits, from them their losses, and in their place the logits' gradient, which is the
    predicted probabilities less the one that is true.
    """
    gradient = torch.zeros_like(hidden_states)
    inputs, targets = hidden_states[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    losses, of_inputs = [], []
    for x, target in zip(inputs.split(TOKENS_AT_ONCE), targets.split(TOKENS_AT_ONCE), strict=True):
        logits, place = (x @ weight.mT).float(), target[:, None]
        # One exponential of each, which takes longer than all else here but the products.
        logits.sub_(logits.amax(dim=1, keepdim=True))
        of_target = logits.gather(1, place)
        normalizer = logits.exp_().sum(dim=1, keepdim=True)
        losses.append(normalizer.log() - of_target)
        logits.div_(normalizer).scatter_add_(1, place, torch.full_like(normalizer, -1.0))
        of_inputs.append(logits.to(weight.dtype) @ weight)
    gradient[:, :-1] = torch.cat(of_inputs).unflatten(0, (len(tokens), -1))
    return gradient, torch.cat(losses).double().unflatten(0, (len(tokens), -1)).sum(dim=(1, 2))


@torch.no_grad()
def of_divergence(hidden_states: Tensor, weight: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence's gradient at the head's input, (samples, length, d), and each sample's, (samples,) in float64.

    Of the logits it is the predicted probabilities less the dense model's.
    """
    divergences, of_inputs = [], []
    pairs = zip(*(states.flatten(0, 1).split(TOKENS_AT_ONCE) for states in (hidden_states, dense)), strict=True)
    for x, y in pairs:
        predicted, wanted = ((states @ weight.mT).float().log_softmax(dim=1) for states in (x, y))
        probabilities = wanted.exp()
        divergences.append((probabilities * wanted.sub_(predicted)).sum(dim=1))
        of_inputs.append(predicted.exp_().sub_(probabilities).to(weight.dtype) @ weight)
    samples, length, _ = hidden_states.shape
    gradient = torch.cat(of_inputs).unflatten(0, (samples, length))
    return gradient, torch.cat(divergences).double().unflatten(0, (samples, length)).sum(dim=1)
