"""Hard concrete gates against their definition, in numpy and by drawing many."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.gates import open_probability, sample


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def drawn(log_alpha, uniform):
    soft = sigmoid(np.log(uniform) - np.log(1 - uniform) + log_alpha)
    return np.minimum(1, np.maximum(0, soft * 1.2 - 0.1))


@pytest.fixture(scope="module")
def uniform() -> np.ndarray:
    return np.random.default_rng(0).uniform(1e-6, 1 - 1e-6, 200_000)


def test_a_gate_is_a_stretched_and_clipped_logistic_variable(uniform):
    log_alpha = np.random.default_rng(1).normal(0, 3, uniform.size)
    found = sample(torch.tensor(log_alpha), torch.tensor(uniform))
    np.testing.assert_allclose(found.numpy(), drawn(log_alpha, uniform), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0, 5.0])
def test_the_probability_that_a_gate_is_open_is_how_often_it_is(uniform, log_alpha):
    often = (drawn(log_alpha, uniform) > 0).mean()
    assert open_probability(torch.tensor(log_alpha)).item() == pytest.approx(often, abs=0.005)


def test_a_gate_has_the_gradient_of_its_definition_between_the_clips_and_none_at_them(uniform):
    uniform, step = uniform[:1000], 1e-6
    log_alpha = torch.full((1000,), 0.7, dtype=torch.float64, requires_grad=True)
    gates = sample(log_alpha, torch.tensor(uniform))
    gates.sum().backward()
    slopes = (drawn(0.7 + step, uniform) - drawn(0.7 - step, uniform)) / (2 * step)
    np.testing.assert_allclose(log_alpha.grad.numpy(), slopes, atol=1e-6)
    is_clipped = (gates == 0) | (gates == 1)
    assert 0 < is_clipped.sum() < 1000 and not log_alpha.grad[is_clipped].any()
