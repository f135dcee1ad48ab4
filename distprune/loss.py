"""The loss that gradients are of: the cross-entropy of every next token of the calibration set, summed.

A sum and not a mean, so that a token's gradients don't depend on how many tokens there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor

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
        runner, dtype = self.runner, self.runner.gradient_dtype
        norm, weight = self._norm(), self.weight.to(runner.device, dtype)
        gradient = torch.empty_like(hidden_states, dtype=dtype)
        losses = torch.empty(len(tokens), dtype=torch.float64)
        for start in range(0, len(tokens), runner.micro_batch):
            batch = slice(start, start + runner.micro_batch)
            given = hidden_states[batch].to(runner.device, dtype, copy=True).requires_grad_()
            with torch.enable_grad():
                output = norm(given)
            of_output, losses[batch] = of_head(output.detach(), weight, tokens[batch].to(runner.device))
            [gradient[batch]] = torch.autograd.grad(output, given, of_output)
        return gradient, losses

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
        normalizer = logits.logsumexp(dim=1, keepdim=True)
        losses.append(normalizer - logits.gather(1, place))
        logits.sub_(normalizer).exp_().scatter_add_(1, place, torch.full_like(normalizer, -1.0))
        of_inputs.append(logits.to(weight.dtype) @ weight)
    gradient[:, :-1] = torch.cat(of_inputs).unflatten(0, (len(tokens), -1))
    return gradient, torch.cat(losses).double().unflatten(0, (len(tokens), -1)).sum(dim=(1, 2))
