"""Tokens drawn from the dense model's predictions, and the gradient of predicting them."""

from __future__ import annotations

import torch

from distprune.layers.loss import draw


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.5, 0.0, 0.2, 0.3, 0.0])
    drawn = draw(probabilities.log().expand(40_000, -1), torch.Generator().manual_seed(0))
    share = drawn.bincount(minlength=5) / len(drawn)
    torch.testing.assert_close(share, probabilities, atol=0.01, rtol=0)
    assert share[1] == share[4] == 0


def test_the_same_generator_draws_the_same_tokens():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)).log_softmax(dim=1)
    first, again = (draw(logits, torch.Generator().manual_seed(7)) for _ in range(2))
    other = draw(logits, torch.Generator().manual_seed(8))
    assert torch.equal(first, again) and not torch.equal(first, other)
