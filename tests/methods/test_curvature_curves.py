"""What curvature predicts a layer's modules to lose, against ½tr(C ΔW H ΔWᵀ) in numpy float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from distprune.layers.parts import Linear
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    KEYS,
    NEURONS,
    QUERIES,
    Site,
)
from distprune.methods import Profile, make_method
from distprune.methods.curvature.curves import HONEST_DAMPING

DAMPING, BRANCH_DAMPING = 0.02, 0.05


def f64(tensor: Tensor) -> np.ndarray:
    return tensor.double().numpy()


def profiled(this) -> tuple[Profile, dict[Site, np.ndarray]]:
    """The profile, and all that is seen in the same pass back through the layer, gradients among it, in float64."""
    method = make_method("curvature", {"damping": DAMPING, "branch_damping": BRANCH_DAMPING})
    return this.profile(method), {site: f64(values) for site, values in this.activations(gradients=True).items()}


def gram(samples: np.ndarray, damping: float = 0.0) -> np.ndarray:
    product = samples.T @ samples / len(samples)
    return product + damping * np.diag(product).mean() * np.eye(len(product))


def cost(change: np.ndarray, metric: np.ndarray, inputs: np.ndarray) -> float:
    return np.trace(metric @ change @ inputs @ change.T) / 2


def cost_of_keeping(projection: Linear, kept: np.ndarray, metric: np.ndarray, inputs: np.ndarray) -> float:
    """What is lost where the kept columns are made to fit as well as they can, by the normal equations."""
    change = f64(projection.weight).copy()
    if len(kept):
        fitted = np.linalg.solve(inputs[np.ix_(kept, kept)], inputs[kept] @ change.T).T
        change[:, kept] -= fitted
    return cost(change, metric, inputs)


def assert_costs(found: Tensor, expected: list[float]) -> None:
    np.testing.assert_allclose(f64(found), expected, rtol=1e-3, atol=1e-4 * max(expected))


def test_an_ffn_costs_at_every_width_what_its_best_fit_loses(any_subject):
    profile, seen = profiled(any_subject)
    metric, inputs = gram(seen[FFN_OUTPUT.gradient], DAMPING), gram(seen[NEURONS], DAMPING)
    order, widths = profile["neuron_order"].numpy(), profile["ffn_widths"].tolist()
    assert sorted(order) == list(range(40)) and widths[0] == 40 and widths[-1] == 0
    expected = [cost_of_keeping(any_subject.ffn.down, order[40 - width :], metric, inputs) for width in widths]
    assert_costs(profile["ffn_costs"], expected)


def test_a_wide_ffn_is_priced_at_some_of_its_widths(subject):
    this = subject(width=150)
    profile, seen = profiled(this)
    metric, inputs = gram(seen[FFN_OUTPUT.gradient], DAMPING), gram(seen[NEURONS], DAMPING)
    order, widths = profile["neuron_order"].numpy(), profile["ffn_widths"].tolist()
    assert widths[0] == 150 and widths[-1] == 0 and len(widths) < 75
    expected = [cost_of_keeping(this.ffn.down, order[150 - width :], metric, inputs) for width in widths]
    assert_costs(profile["ffn_costs"], expected)


def test_going_without_groups_costs_what_the_best_fit_of_the_others_loses(any_subject):
    profile, seen = profiled(any_subject)
    groups, width = any_subject.attention.kv_heads, 8 * any_subject.attention.query_heads
    metric, inputs = gram(seen[ATTENTION_OUTPUT.gradient], DAMPING), gram(seen[ATTENDED], DAMPING)
    columns = np.arange(width).reshape(groups, -1)
    order = profile["group_order"].numpy()
    assert sorted(order) == list(range(groups))
    expected = [
        cost_of_keeping(any_subject.attention.output, np.sort(columns[order[gone:]].ravel()), metric, inputs)
        for gone in range(groups + 1)
    ]
    assert_costs(profile["group_costs"], expected)


def test_fewer_value_neurons_cost_what_the_heads_lose_each_by_itself(any_subject):
    """The heads of a group share a rotation and the mean of their Gram matrices."""
    profile, seen = profiled(any_subject)
    attention, metric = any_subject.attention, gram(seen[ATTENTION_OUTPUT.gradient], DAMPING)
    values = np.split(seen[ATTENDED], attention.query_heads, axis=1)
    weights = np.split(f64(attention.output.weight), attention.query_heads, axis=1)
    per_group = attention.query_heads // attention.kv_heads
    for group in range(attention.kv_heads):
        heads = range(group * per_group, (group + 1) * per_group)
        inputs = gram(np.concatenate([values[head] for head in heads]))
        rotation, expected = f64(profile["value_rotation"][group]), []
        np.testing.assert_allclose(rotation.T @ rotation, np.eye(8), atol=1e-5)
        for kept in range(9):
            basis = rotation[:, :kept]
            changes = [weights[head] for head in heads]
            if kept:
                within = np.linalg.inv(basis.T @ inputs @ basis) @ basis.T @ inputs
                changes = [change - change @ within.T @ basis.T for change in changes]
            expected.append(sum(cost(change, metric, inputs) for change in changes))
        assert_costs(profile["value_costs"][group], expected)


def test_a_rotary_pair_costs_what_its_scaling_changes_the_loss_by_squared(any_subject):
    profile, seen = profiled(any_subject)
    attention = any_subject.attention
    per_head = (seen[QUERIES] * seen[QUERIES.gradient]).reshape(
        -1, attention.kv_heads, attention.query_heads // attention.kv_heads, 2, 4
    )
    power = (per_head.sum(axis=(2, 3)) ** 2).mean(axis=0)
    for group in range(attention.kv_heads):
        order = profile["pair_order"][group].numpy()
        assert order.tolist() == np.argsort(power[group]).tolist()
        assert_costs(profile["pair_costs"][group], [power[group][order[:gone]].sum() / 2 for gone in range(5)])


@pytest.mark.parametrize(
    ("name", "inputs", "gradient"),
    [
        ("query", ATTENTION_INPUT, QUERIES.gradient),
        ("key", ATTENTION_INPUT, KEYS.gradient),
        ("output", ATTENDED, ATTENTION_OUTPUT.gradient),
    ],
)
def test_a_factored_projection_costs_what_the_best_of_its_rank_loses(any_subject, name, inputs, gradient):
    """By Eckart and Young, on C^½ W H^½; and the factors of the profile lose no more."""
    profile, seen = profiled(any_subject)
    weight = f64(getattr(any_subject.attention, name).weight)
    metric, inner = gram(seen[gradient], DAMPING), gram(seen[inputs], DAMPING)
    singular = np.linalg.svd(np.linalg.cholesky(metric).T @ weight @ np.linalg.cholesky(inner), compute_uv=False)
    costs, left, right = (profile[f"{name}_{part}"] for part in ("costs", "left", "right"))
    out, width = weight.shape
    assert len(costs) - 1 == left.shape[1] == len(right)
    assert (len(costs) - 1) * (out + width) < out * width <= len(costs) * (out + width)
    assert_costs(costs, [(singular[rank:] ** 2).sum() / 2 for rank in range(len(costs))])
    for rank in range(1, len(costs)):
        change = weight - f64(left[:, :rank]) @ f64(right[:rank]) @ weight
        assert cost(change, metric, inner) == pytest.approx(costs[rank].item(), rel=1e-2, abs=1e-5 * costs[0].item())


def test_a_branch_saves_what_the_best_of_its_rank_beside_the_kept_neurons_does(any_subject):
    profile, seen = profiled(any_subject)
    metric = gram(seen[FFN_OUTPUT.gradient], DAMPING)
    honest = HONEST_DAMPING * BRANCH_DAMPING
    neurons, inputs = gram(seen[NEURONS], honest), gram(seen[FFN_INPUT], honest)
    cross = seen[FFN_INPUT].T @ seen[NEURONS] / len(seen[FFN_INPUT])
    order, down = profile["neuron_order"].numpy(), f64(any_subject.ffn.down.weight)
    assert profile["branch_widths"].tolist() == [30, 20, 10]
    for width, savings in zip(profile["branch_widths"].tolist(), profile["branch_savings"], strict=True):
        gone, kept = order[: 40 - width], order[40 - width :]
        # All that is seen, kept neurons before inputs, and what it should give.
        joint = np.block([[neurons[np.ix_(kept, kept)], cross[:, kept].T], [cross[:, kept], inputs]])
        wanted = np.vstack([neurons[np.ix_(kept, gone)], cross[:, gone]]) @ down[:, gone].T
        branch = np.linalg.solve(joint, wanted)[width:].T
        unknown = np.linalg.inv(np.linalg.inv(joint)[width:, width:])
        singular = np.linalg.svd(np.linalg.cholesky(metric).T @ branch @ np.linalg.cholesky(unknown), compute_uv=False)
        assert_costs(savings, [np.square(singular[:rank]).sum() / 2 for rank in range(len(savings))])


def test_what_more_is_gone_never_costs_less(any_subject):
    profile, _ = profiled(any_subject)
    for costs in (profile["group_costs"], profile["ffn_costs"], profile["pair_costs"], profile["value_costs"].flip(-1)):
        assert (costs[..., 0] == 0).all() and (costs.diff(dim=-1) >= 0).all() and (costs[..., -1] > 0).all()
    assert (profile["ffn_widths"].diff() < 0).all()
    for name in ("query_costs", "key_costs", "output_costs"):
        assert (profile[name].diff() <= 0).all() and (profile[name] >= 0).all()


def test_a_layer_that_neither_sees_nor_gives_anything_has_finite_curves(subject):
    this = subject(biases=False)
    profile, seen = profiled(replace(this, hidden_states=torch.zeros_like(this.hidden_states)))
    assert not any(values.any() for values in seen.values())
    assert all(tensor.isfinite().all() for tensor in profile.values())


def test_the_same_statistics_give_the_same_profile(subject):
    first, again = (profiled(subject())[0] for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_profile_takes_the_bytes_that_disk_space_is_planned_for(any_subject):
    profile, _ = profiled(any_subject)
    method, shape = make_method("curvature", {}), any_subject.layer.shape
    large = sum(tensor.nbytes for name, tensor in profile.items() if name.endswith(("_left", "_right", "_root")))
    assert method.profile_bytes(24, shape) == large
    assert make_method("curvature", {"factored": False, "calibrated": False}).profile_bytes(24, shape) == 0


def test_an_ffn_without_a_gate_costs_what_its_best_fit_loses(gateless):
    profile, seen = profiled(gateless)
    metric, inputs = gram(seen[FFN_OUTPUT.gradient], DAMPING), gram(seen[NEURONS], DAMPING)
    order, widths = profile["neuron_order"].numpy(), profile["ffn_widths"].tolist()
    expected = [cost_of_keeping(gateless.ffn.down, order[40 - width :], metric, inputs) for width in widths]
    assert_costs(profile["ffn_costs"], expected)


@pytest.mark.parametrize("part", ["attention", "ffn"])
def test_a_layer_without_a_part_has_the_curves_of_the_other(subject, part):
    whole, method = subject(), make_method("curvature", {})
    partial = whole.changed(**{part: None})
    names = whole.profile(method).keys()
    others = {name for name in names if ("ffn" in name or "neuron" in name or "branch" in name) == (part == "ffn")}
    assert partial.profile(method).keys() == names - others
