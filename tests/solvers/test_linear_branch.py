"""The branch beside a pruned map, against penalized least squares on the samples themselves, in numpy float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from distprune.solvers import linear_branch

TOKENS, INPUTS, NEURONS, OUT, DAMPING = 200, 12, 30, 9, 0.02


def samples(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs x, neurons z that are in part linear in them, and a weight."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(TOKENS, INPUTS)) * np.linspace(0.5, 4, INPUTS)
    z = np.maximum(x @ random.normal(size=(INPUTS, NEURONS)), 0) + random.normal(size=(TOKENS, NEURONS))
    return x, z, random.normal(size=(OUT, NEURONS))


def branch(x: np.ndarray, z: np.ndarray, weight: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    moments = z.T @ z / TOKENS, x.T @ x / TOKENS, x.T @ z / TOKENS
    gram, input_gram, cross = (torch.from_numpy(moment).float() for moment in moments)
    solution, unknown = linear_branch(
        torch.from_numpy(weight).float(), torch.from_numpy(kept), gram, input_gram, cross, DAMPING
    )
    return solution.double().numpy(), unknown.double().numpy()


def penalized(seen: np.ndarray, target: np.ndarray, penalties: np.ndarray) -> tuple[np.ndarray, float]:
    """The ridge regression of the target on what is seen, by least squares on more rows, and its least objective."""
    rows = np.vstack([seen / np.sqrt(TOKENS), np.diag(np.sqrt(penalties))])
    wanted = np.vstack([target / np.sqrt(TOKENS), np.zeros((seen.shape[1], target.shape[1]))])
    solution = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    return solution, np.square(rows @ solution - wanted).sum()


@pytest.mark.parametrize("count", [0, 1, 11, 29, 30])
def test_it_is_the_part_of_the_inputs_in_the_best_fit_of_all_that_is_there(count):
    x, z, weight = samples()
    kept = np.random.default_rng(1).permutation(NEURONS)[:count]
    gone = np.setdiff1d(np.arange(NEURONS), kept)
    target = z[:, gone] @ weight[:, gone].T
    of_neurons = np.full(count, DAMPING * np.square(z).mean(axis=0).mean())
    of_inputs = np.full(INPUTS, DAMPING * np.square(x).mean(axis=0).mean())
    solution, unknown = branch(x, z, weight, kept)

    expected, error = penalized(np.hstack([z[:, kept], x]), target, np.concatenate([of_neurons, of_inputs]))
    np.testing.assert_allclose(solution, expected[count:].T, rtol=1e-4, atol=1e-4)
    _, without = penalized(z[:, kept], target, of_neurons)
    np.testing.assert_allclose(np.trace(solution @ unknown @ solution.T), without - error, rtol=1e-4, atol=1e-6)


def test_neurons_and_inputs_that_are_never_active_give_no_branch():
    solution, unknown = branch(np.zeros((TOKENS, INPUTS)), np.zeros((TOKENS, NEURONS)), samples()[2], np.arange(5))
    assert not solution.any()
    assert np.isfinite(unknown).all()


def test_where_nothing_is_gone_there_is_nothing_to_make_up_for():
    x, z, weight = samples()
    assert not branch(x, z, weight, np.arange(NEURONS))[0].any()
