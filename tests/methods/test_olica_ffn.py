"""Olica on the FFN: which neurons go, and the linear calibration that stands in for them, on the samples themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.layers.parts import FeedForward
from distprune.layers.sites import ATTENTION_OUTPUT, FFN_INPUT, FFN_OUTPUT, NEURONS
from distprune.methods.olica import Olica, ffn_importance
from distprune.statistics import Power

WIDTH, KEPT, HIDDEN = 40, 22, 24


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def prune_ffn(subject, method: Olica, width: int = KEPT, branch_rank: int | None = None) -> FeedForward:
    """The FFN of a layer whose attention loses nothing."""
    return subject.prune(method, subject.layer.shape.with_ffn(width=width, branch_rank=branch_rank)).ffn


def importance(subject) -> np.ndarray:
    """Norms of the rows that feed a neuron and of its down column, each scaled by its input's rms, one at a time."""
    ffn, seen = subject.ffn, subject.activations()
    x_rms, a_rms = (np.sqrt((f64(seen[site]) ** 2).mean(axis=0)) for site in (FFN_INPUT, NEURONS))
    inputs, down = [f64(projection.weight) for projection in ffn.inputs], f64(ffn.down.weight)
    return np.array(
        [
            sum(np.linalg.norm(rows[neuron] * x_rms) for rows in inputs)
            + np.linalg.norm(down[:, neuron]) * a_rms[neuron]
            for neuron in range(WIDTH)
        ]
    )


def kept_neurons(before: FeedForward, after: FeedForward) -> list[int]:
    """Which of the dense layer's neurons the pruned one has, by comparing rows."""
    return (after.up.weight[:, None] == before.up.weight[None]).all(dim=-1).int().argmax(dim=1).tolist()


def measured_importance(subject) -> torch.Tensor:
    statistics = subject.statistics([Power(FFN_INPUT), Power(NEURONS)])
    return ffn_importance(subject.ffn, statistics.rms(FFN_INPUT), statistics.rms(NEURONS))


def test_ffn_importance_is_the_sum_of_three_scaled_norms(any_subject):
    np.testing.assert_allclose(f64(measured_importance(any_subject)), importance(any_subject), rtol=1e-4)


def test_without_a_gate_it_is_the_sum_of_two(gateless):
    np.testing.assert_allclose(f64(measured_importance(gateless)), importance(gateless), rtol=1e-4)


@pytest.mark.parametrize(("keep_least", "least"), [(0.0, 0), (0.01, 0), (0.1, 4), (0.9, KEPT)])
def test_the_most_important_neurons_stay_and_a_few_of_the_least(subject, keep_least, least):
    dense = subject()
    ranked = np.argsort(-importance(dense), kind="stable")
    pruned = prune_ffn(dense, Olica(keep_least=keep_least))
    assert kept_neurons(dense.ffn, pruned) == sorted([*ranked[: KEPT - least], *ranked[WIDTH - least :]])


@pytest.mark.parametrize("biases", [True, False])
def test_dropping_neurons_changes_nothing_else(subject, biases):
    """The layer computes what the dense one does when the dropped neurons are silent."""
    dense = subject(biases=biases)
    pruned = prune_ffn(dense, Olica())
    assert pruned.branch is None
    silence = torch.zeros(WIDTH).index_fill(0, torch.tensor(kept_neurons(dense.ffn, pruned)), 1)
    down = dense.ffn.down
    silenced = replace(dense.ffn, down=replace(down, weight=down.weight * silence))
    torch.testing.assert_close(dense.run_with(ffn=pruned), dense.run_with(ffn=silenced), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the linear calibration


def ffn(network: FeedForward, x: np.ndarray) -> np.ndarray:
    """A gated FFN without its branch, in float64."""

    def affine(linear, x: np.ndarray) -> np.ndarray:
        return x @ f64(linear.weight).T + (0 if linear.bias is None else f64(linear.bias))

    gate = affine(network.gate, x)
    return affine(network.down, gate * sigmoid(gate) * affine(network.up, x))


def input_and_residual(subject, pruned: FeedForward) -> tuple[np.ndarray, np.ndarray]:
    """X, and what the pruned FFN lacks on it: R = dense FFN - pruned FFN."""
    x = f64(subject.activations()[FFN_INPUT])
    return x, ffn(subject.ffn, x) - ffn(pruned, x)


def ridge_on_samples(x: np.ndarray, residual: np.ndarray, percdamp: float) -> np.ndarray:
    """(XᵀX + λI)⁻¹XᵀR, λ = percdamp · mean(diag XᵀX) / (tokens / 128²), as the paper's code has it."""
    gram = x.T @ x
    damping = percdamp * np.diag(gram).mean() / (len(x) / 128**2)
    return np.linalg.solve(gram + damping * np.eye(len(gram)), x.T @ residual)


def branch(network: FeedForward) -> np.ndarray:
    return f64(network.branch.left) @ f64(network.branch.right)


UNWEIGHTED = 1e9  # a temperature at which all output channels weigh the same


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("percdamp", [0.5, 0.01])
def test_the_full_rank_calibration_is_ridge_regression_of_the_residual(subject, biases, percdamp):
    dense = subject(biases=biases)
    method = Olica(percdamp=percdamp, channel_temperature=UNWEIGHTED)
    pruned = prune_ffn(dense, method, branch_rank=HIDDEN)
    expected = ridge_on_samples(*input_and_residual(dense, pruned), percdamp).T
    np.testing.assert_allclose(branch(pruned), expected, atol=1e-3 * np.abs(expected).max())


def test_the_truncated_calibration_is_the_svd_of_the_channel_weighted_ridge_solution(subject):
    dense, percdamp, temperature = subject(), 0.01, 0.05
    pruned = prune_ffn(dense, Olica(percdamp=percdamp, channel_temperature=temperature), branch_rank=3)
    x, residual = input_and_residual(dense, pruned)
    solution = ridge_on_samples(x, residual, percdamp)
    correlation = np.array(
        [np.corrcoef(x @ solution[:, channel], residual[:, channel])[0, 1] for channel in range(HIDDEN)]
    )
    weights = sigmoid((correlation - correlation.mean()) / temperature)
    assert weights.max() > 2 * weights.min()
    u, s, vt = np.linalg.svd(weights[:, None] * solution.T)
    expected = (u[:, :3] * s[:3]) @ vt[:3] / weights[:, None]
    np.testing.assert_allclose(branch(pruned), expected, atol=2e-3 * np.abs(expected).max())


def test_calibration_repairs_as_much_of_the_layers_output_as_least_squares_can(subject):
    dense = subject()
    bare = prune_ffn(dense, Olica())
    repaired = prune_ffn(dense, Olica(percdamp=1e-9, channel_temperature=UNWEIGHTED), branch_rank=HIDDEN)
    target = dense.run(dense.layer)
    before, after = ((target - dense.run_with(ffn=each)).double().norm().item() for each in (bare, repaired))
    x, residual = input_and_residual(dense, bare)
    assert before == pytest.approx(np.linalg.norm(residual), rel=1e-3)
    _, unexplained, *_ = np.linalg.lstsq(x, residual, rcond=None)
    assert after == pytest.approx(np.sqrt(unexplained.sum()), rel=1e-3)
    assert after < 0.95 * before


def test_calibration_of_an_ffn_that_lost_nothing_adds_nothing(subject):
    dense = subject()
    pruned = prune_ffn(dense, Olica(), width=WIDTH, branch_rank=3)
    assert np.abs(branch(pruned)).max() < 1e-6
    torch.testing.assert_close(dense.run_with(ffn=pruned), dense.run(dense.layer), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the dense pass


def test_the_profile_holds_the_outputs_rms_and_how_linear_the_ffn_is(subject):
    dense, method = subject(), Olica(percdamp=0.01, decomposition="weights")
    seen = {site: values.numpy() for site, values in dense.activations().items()}
    profile = dense.profile(method)
    expected = np.sqrt((seen[ATTENTION_OUTPUT] ** 2).mean(axis=0))
    np.testing.assert_allclose(f64(profile["attention_output_rms"]), expected, rtol=1e-4)

    x, y = seen[FFN_INPUT], seen[FFN_OUTPUT]
    prediction = x @ ridge_on_samples(x, y, percdamp=0.01)
    correlations = [np.corrcoef(prediction[:, channel], y[:, channel])[0, 1] for channel in range(HIDDEN)]
    assert profile["ffn_linearity"].item() == pytest.approx(np.mean(correlations), abs=1e-3)


def test_a_linear_ffn_is_told_from_a_random_one(subject):
    """A gate that is constant and wide open, where SiLU is the identity, leaves a linear map of the input."""
    dense = subject()
    gate = replace(dense.ffn.gate, weight=torch.zeros(WIDTH, HIDDEN), bias=torch.full((WIDTH,), 30.0))
    up, down = (replace(linear, bias=torch.zeros_like(linear.bias)) for linear in (dense.ffn.up, dense.ffn.down))
    linear = dense.changed(ffn=FeedForward(gate, up, down))
    method = Olica(percdamp=1e-6)
    scores = [each.profile(method)["ffn_linearity"].item() for each in (linear, dense)]
    assert scores[0] == pytest.approx(1, abs=1e-3)
    assert scores[1] < 0.9


def test_the_full_rank_calibration_of_an_ffn_without_a_gate_is_ridge_regression_too(gateless):
    """Of what the layer's own runs show that the pruned network lacks."""
    pruned = prune_ffn(gateless, Olica(percdamp=0.01, channel_temperature=UNWEIGHTED), branch_rank=HIDDEN)
    bare = replace(gateless.layer, ffn=replace(pruned, branch=None))
    x, residual = (
        f64(gateless.activations()[FFN_INPUT]),
        f64(gateless.activations()[FFN_OUTPUT] - gateless.activations(bare)[FFN_OUTPUT]),
    )
    expected = ridge_on_samples(x, residual, 0.01).T
    np.testing.assert_allclose(branch(pruned), expected, atol=1e-3 * np.abs(expected).max())
