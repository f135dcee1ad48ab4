"""Losses at the model's end and their gradients: of every next token's cross-entropy, and of what a pruned model's
predictions differ from the dense one's.

Sums over tokens and not means, so that a token's gradients don't depend on how many tokens there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distprune.checks import check_gradient
from distprune.layers.runner import LayerRunner

#: Tokens whose logits exist at once: a vocabulary is some ten times as wide as a layer.
TOKENS_AT_ONCE = 256
#: From logits (tokens, vocabulary) to a loss for each of the tokens.
Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class LossHead:
    """What follows the last layer, as the model's own class computes it.

    Args:
        runner: that of the layers, whose micro-batches, dtype for gradients and device are taken. Its shell holds the
            outer tensors, in the dtype for gradients.
    """

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
        targets = F.pad(tokens[:, 1:], (0, 1), value=-100).to(self.runner.device)  # what has no target has no loss

        def loss_of(places: slice, sample: int) -> Loss:
            return lambda logits: F.cross_entropy(logits, targets[sample, places], reduction="none")

        return self._through(hidden_states, loss_of)

    def divergence(self, hidden_states: Tensor, dense: Tensor) -> tuple[Tensor, Tensor]:
        """Of the Kullback-Leibler divergence of a pruned model's predictions from the dense model's.

        Args:
            hidden_states: at the pruned model's last layer's output, (samples, length, d).
            dense: at the dense model's.

        Returns:
            The gradient and each sample's divergence, as :meth:`gradient` gives them.
        """

        def loss_of(places: slice, sample: int) -> Loss:
            with torch.no_grad():
                wanted = self._predictions(dense[sample, places])
            return lambda logits: divergence_from(wanted, logits.log_softmax(dim=1))

        return self._through(hidden_states, loss_of)

    @torch.no_grad()
    def divergences(self, variants: Tensor, dense: Tensor) -> Tensor:
        """How far the predictions of several pruned models are from the dense model's, without gradients.

        Args:
            variants: at the pruned models' last layer's output, (samples, variants, length, d).
            dense: at the dense model's, (samples, length, d).

        Returns:
            Each sample's Kullback-Leibler divergence in nats, (samples, variants) in float64 on the CPU.
        """
        found = torch.zeros(variants.shape[:2], dtype=torch.float64)
        for sample, states in enumerate(variants):
            for start in range(0, states.shape[1], TOKENS_AT_ONCE):
                places = slice(start, start + TOKENS_AT_ONCE)
                wanted = self._predictions(dense[sample, places])
                for variant, own in enumerate(states):
                    predicted = self._logits(self._placed(own[places])).log_softmax(dim=1)
                    found[sample, variant] += divergence_from(wanted, predicted).double().sum().cpu()
        return found

    def _predictions(self, hidden_states: Tensor) -> Predictions:
        logits = self._logits(self._placed(hidden_states))
        return Predictions(logits.softmax(dim=1), logits.log_softmax(dim=1))

    def sampled(self, hidden_states: Tensor, dense: Tensor, first: int) -> tuple[Tensor, Tensor]:
        """Of the loss of predicting tokens that are drawn from the dense model's predictions.

        Its gradients' second moment is, on average, the curvature of the divergence from these predictions (the Fisher
        information, where both models predict alike).

        Args:
            hidden_states: at the pruned model's last layer's output, (samples, length, d).
            dense: at the dense model's.
            first: the number of the first sample, by which each draws its own tokens.

        Returns:
            The gradient, as :meth:`gradient` gives it, and each sample's divergence, as :meth:`divergence` does.
        """
        generators = [torch.Generator().manual_seed(first + sample) for sample in range(len(hidden_states))]
        divergences = torch.zeros(len(hidden_states), dtype=torch.float64)

        def loss_of(places: slice, sample: int) -> Loss:
            with torch.no_grad():
                wanted = self._predictions(dense[sample, places])
                drawn = draw(wanted.log_probabilities, generators[sample])

            def loss(logits: Tensor) -> Tensor:
                predicted = logits.log_softmax(dim=1)
                with torch.no_grad():
                    divergences[sample] += divergence_from(wanted, predicted).double().sum().cpu()
                return F.nll_loss(predicted, drawn, reduction="none")

            return loss

        gradient, _ = self._through(hidden_states, loss_of)
        return gradient, divergences

    def _through(self, hidden_states: Tensor, loss_of: Callable[[slice, int], Loss]) -> tuple[Tensor, Tensor]:
        """Losses and their gradients, some tokens of a sample at a time."""
        samples, length, _ = hidden_states.shape
        gradient = self.runner.empty_like(hidden_states, self.runner.gradient_dtype)
        losses = torch.zeros(samples, dtype=torch.float64)
        for sample in range(samples):
            for start in range(0, length, TOKENS_AT_ONCE):
                places = slice(start, start + TOKENS_AT_ONCE)
                given = self._placed(hidden_states[sample, places]).requires_grad_()
                with torch.enable_grad():
                    each = loss_of(places, sample)(self._logits(given))
                    total = each.sum()
                [at_input] = torch.autograd.grad(total, given)
                check_gradient(at_input, "the model's end")
                gradient[sample, places] = at_input
                losses[sample] += each.detach().double().sum().cpu()
        return gradient, losses

    def _logits(self, hidden_states: Tensor) -> Tensor:
        return self.runner.shell.logits(hidden_states).float()

    def _placed(self, hidden_states: Tensor) -> Tensor:
        # A copy, since what was made in inference mode has no gradients.
        return hidden_states.detach().to(self.runner.device, self.runner.gradient_dtype, copy=True)


@dataclass(frozen=True)
class Predictions:
    """A model's predictions of tokens.

    Attributes:
        probabilities: (tokens, vocabulary).
        log_probabilities: their logarithms.
    """

    probabilities: Tensor
    log_probabilities: Tensor


def divergence_from(wanted: Predictions, log_probabilities: Tensor) -> Tensor:
    """The Kullback-Leibler divergence of predictions from others, in nats.

    Both factors are at hand already: exponentiating a vocabulary again, as ``kl_div`` does, takes longer than the
    logits do.

    Args:
        log_probabilities: those predicted, (tokens, vocabulary).

    Returns:
        Of each token, (tokens,).
    """
    return torch.linalg.vecdot(wanted.probabilities, wanted.log_probabilities - log_probabilities)


def draw(log_probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """A token for each row of log-probabilities, (tokens, vocabulary); the same on every device, rounding aside."""
    cumulative = log_probabilities.double().exp().cumsum(dim=1)
    uniform = torch.rand(len(cumulative), 1, generator=generator, dtype=torch.float64).to(cumulative.device)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return drawn.squeeze(1).clamp(max=cumulative.shape[1] - 1)
