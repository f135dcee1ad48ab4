"""Olica on the FFN: which neurons go, and the linear calibration that stands in for them, on the samples themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from distprune.decoder_layer import DecoderLayer
from distprune.methods import Olica
from distprune.methods.olica import ffn_importance
from distprune.statistics import Power

WIDTH, KEPT, HIDDEN = 40, 22, 24


def f64(tensor: torch.Tensor) -> np.ndarray:
    return tensor.double().numpy()


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def prune_ffn(subject, method: Olica, width: int = KEPT, calibration_rank: int | None = None) -> DecoderLayer:
    """The layer with its attention at full width and rank, so that the FFN alone loses something."""
    layer = subject.layer
    planned = replace(layer.shape, query_rank=24, key_rank=16, ffn_width=width, calibration_rank=calibration_rank)
    profile = method.profile(layer, subject.statistics(method.dense_moments(layer.shape)))
    statistics = subject.statistics(method.pruning_moments(layer.shape, planned))
    return method.prune(layer, planned, statistics, profile, subject.observe)


def importance(subject) -> np.ndarray:
    """Norms of up row, gate row and down column, each scaled by its input's rms, one neuron at a time."""
    layer, taps = subject.layer, subject.activations()
    x_rms, a_rms = (np.sqrt((f64(taps[tap]) ** 2).mean(axis=0)) for tap in ("ffn_input", "ffn_neurons"))
    up, gate, down = f64(layer.up.weight), f64(layer.gate.weight), f64(layer.down.weight)
    return np.array(
        [
            np.linalg.norm(up[neuron] * x_rms)
            + np.linalg.norm(gate[neuron] * x_rms)
            + np.linalg.norm(down[:, neuron]) * a_rms[neuron]
            for neuron in range(WIDTH)
        ]
    )


def kept_neurons(before: DecoderLayer, after: DecoderLayer) -> list[int]:
    """Which of the dense layer's neurons the pruned one has, by comparing rows."""
    return (after.up.weight[:, None] == before.up.weight[None]).all(dim=-1).int().argmax(dim=1).tolist()


def test_ffn_importance_is_the_sum_of_three_scaled_norms(any_subject):
    statistics = any_subject.statistics([Power("ffn_input"), Power("ffn_neurons")])
    measured = ffn_importance(any_subject.layer, statistics.rms("ffn_input"), statistics.rms("ffn_neurons"))
    np.testing.assert_allclose(f64(measured), importance(any_subject), rtol=1e-4)


@pytest.mark.parametrize(("keep_least", "least"), [(0.0, 0), (0.01, 0), (0.1, 4), (0.9, KEPT)])
def test_the_most_important_neurons_stay_and_a_few_of_the_least(subject, keep_least, least):
    dense = subject()
    ranked = np.argsort(-importance(dense), kind="stable")
    pruned = prune_ffn(dense, Olica(keep_least=keep_least))
    assert kept_neurons(dense.layer, pruned) == sorted([*ranked[: KEPT - least], *ranked[WIDTH - least :]])


@pytest.mark.parametrize("biases", [True, False])
def test_dropping_neurons_changes_nothing_else(subject, biases):
    """The layer computes what the dense one does when the dropped neurons are silent."""
    dense = subject(biases=biases)
    pruned = prune_ffn(dense, Olica())
    assert pruned.calibration is None
    silence = torch.zeros(WIDTH).index_fill(0, torch.tensor(kept_neurons(dense.layer, pruned)), 1)
    down = dense.layer.down
    silenced = replace(dense.layer, down=replace(down, weight=down.weight * silence))
    torch.testing.assert_close(dense.run(pruned), dense.run(silenced), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the linear calibration


def ffn(layer: DecoderLayer, x: np.ndarray) -> np.ndarray:
    """The FFN without its calibration branch, in float64."""

    def affine(linear, x: np.ndarray) -> np.ndarray:
        return x @ f64(linear.weight).T + (0 if linear.bias is None else f64(linear.bias))

    gate = affine(layer.gate, x)
    return affine(layer.down, gate * sigmoid(gate) * affine(layer.up, x))


def input_and_residual(subject, pruned: DecoderLayer) -> tuple[np.ndarray, np.ndarray]:
    """X, and what the pruned FFN lacks on it: R = dense FFN - pruned FFN."""
    x = f64(subject.activations()["ffn_input"])
    return x, ffn(subject.layer, x) - ffn(pruned, x)


def ridge_on_samples(x: np.ndarray, residual: np.ndarray, percdamp: float) -> np.ndarray:
    """(XᵀX + λI)⁻¹XᵀR, λ = percdamp · mean(diag XᵀX) / (tokens / 128²), as the paper's code has it."""
    gram = x.T @ x
    damping = percdamp * np.diag(gram).mean() / (len(x) / 128**2)
    return np.linalg.solve(gram + damping * np.eye(len(gram)), x.T @ residual)


def branch(layer: DecoderLayer) -> np.ndarray:
    return f64(layer.calibration.left) @ f64(layer.calibration.right)


UNWEIGHTED = 1e9  # a temperature at which all output channels weigh the same


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("percdamp", [0.5, 0.01])
def test_the_full_rank_calibration_is_ridge_regression_of_the_residual(subject, biases, percdamp):
    dense = subject(biases=biases)
    method = Olica(percdamp=percdamp, channel_temperature=UNWEIGHTED)
    pruned = prune_ffn(dense, method, calibration_rank=HIDDEN)
    expected = ridge_on_samples(*input_and_residual(dense, pruned), percdamp).T
    np.testing.assert_allclose(branch(pruned), expected, atol=1e-3 * np.abs(expected).max())


def test_the_truncated_calibration_is_the_svd_of_the_channel_weighted_ridge_solution(subject):
    dense, percdamp, temperature = subject(), 0.01, 0.05
    pruned = prune_ffn(dense, Olica(percdamp=percdamp, channel_temperature=temperature), calibration_rank=3)
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
    mended = prune_ffn(dense, Olica(percdamp=1e-9, channel_temperature=UNWEIGHTED), calibration_rank=HIDDEN)
    target = dense.run(dense.layer)
    before, after = ((target - dense.run(layer)).double().norm().item() for layer in (bare, mended))
    x, residual = input_and_residual(dense, bare)
    assert before == pytest.approx(np.linalg.norm(residual), rel=1e-3)
    _, unexplained, *_ = np.linalg.lstsq(x, residual, rcond=None)
    assert after == pytest.approx(np.sqrt(unexplained.sum()), rel=1e-3)
    assert after < 0.95 * before


def test_calibration_of_an_ffn_that_lost_nothing_adds_nothing(subject):
    dense = subject()
    pruned = prune_ffn(dense, Olica(), width=WIDTH, calibration_rank=3)
    assert np.abs(branch(pruned)).max() < 1e-6
    torch.testing.assert_close(dense.run(pruned), dense.run(dense.layer), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- the dense pass


def test_the_profile_holds_the_outputs_rms_and_how_linear_the_ffn_is(subject):
    dense, method = subject(), Olica(percdamp=0.01, decomposition="weights")
    taps = {tap: values.numpy() for tap, values in dense.activations().items()}
    profile = method.profile(dense.layer, dense.statistics(method.dense_moments(dense.layer.shape)))
    expected = np.sqrt((taps["attention_output"] ** 2).mean(axis=0))
    np.testing.assert_allclose(f64(profile["attention_output_rms"]), expected, rtol=1e-4)

    x, y = taps["ffn_input"], taps["ffn_output"]
    prediction = x @ ridge_on_samples(x, y, percdamp=0.01)
    correlations = [np.corrcoef(prediction[:, channel], y[:, channel])[0, 1] for channel in range(HIDDEN)]
    assert profile["ffn_linearity"].item() == pytest.approx(np.mean(correlations), abs=1e-3)


def test_a_linear_ffn_is_told_from_a_random_one(subject):
    """A gate that is constant and wide open, where SiLU is the identity, leaves a linear map of the input."""
    dense = subject()
    gate = replace(dense.layer.gate, weight=torch.zeros(WIDTH, HIDDEN), bias=torch.full((WIDTH,), 30.0))
    up, down = (replace(part, bias=torch.zeros_like(part.bias)) for part in (dense.layer.up, dense.layer.down))
    linear = replace(dense.layer, gate=gate, up=up, down=down)
    method = Olica(percdamp=1e-6)
    scores = [
        method.profile(layer, dense.statistics(method.dense_moments(layer.shape), layer))["ffn_linearity"].item()
        for layer in (linear, dense.layer)
    ]
    assert scores[0] == pytest.approx(1, abs=1e-3)
    assert scores[1] < 0.9
