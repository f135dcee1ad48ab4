"""HEAPr's costs, against autograd and numpy on the experts' own outputs, and its one ranking over all layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixture_layers import EXPERTS, MIXTURES, WIDTH, routed
from tiny_architectures import tiny

from distprune.budgets import Target
from distprune.errors import InputError
from distprune.layers.runner import LayerRunner
from distprune.methods.heapr import Heapr

QUARTERS = (8, 16, 24, 32)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen2_moe", "deepseek_v3"])
def test_costs_are_those_of_what_each_neuron_adds_in_the_metric_of_the_gradient(subject, model_type):
    """Half the mean of (eₖ·g)² over pairs of tokens, one for the neuron and one for the gradient, by autograd."""
    this = subject(model_type, **MIXTURES[model_type])
    profile = this.profile(Heapr())
    runner = LayerRunner(this.model, torch.device("cpu"), torch.float32, micro_batch=8)
    module = runner.build(this.layer, 0, torch.float32)
    outputs: list[torch.Tensor] = []

    def see(_, __, output):
        output = output[0] if isinstance(output, tuple) else output
        output.retain_grad()
        outputs.append(output)

    module.mlp.register_forward_hook(see)
    states = this.hidden_states.clone().requires_grad_()
    (runner.forward(module, 0, states).square().sum() / 2).backward()
    gradient = outputs[0].grad.flatten(0, -2).double().numpy()
    seen, tokens = routed(this.model, this.layer, this.hidden_states), this.hidden_states[..., 0].numel()
    steps = np.zeros(WIDTH)
    for expert in range(EXPERTS):
        network, (x, weight) = this.ffn.expert(expert), (each.double().numpy() for each in seen.to(expert))
        gate, up, down = (each.weight.double().numpy() for each in (*network.inputs, network.down))
        projected = x @ gate.T
        neurons = weight * projected / (1 + np.exp(-projected)) * (x @ up.T)
        pairs = [(np.outer(neurons[:, k], gradient @ down[:, k]) ** 2).mean() / 2 for k in range(WIDTH)]
        np.testing.assert_allclose(profile["experts.neurons"][expert], pairs, rtol=1e-3)
        steps += np.sort(pairs) * len(x) / tokens
    # What all experts' neurons of one rank cost together, over all tokens.
    np.testing.assert_allclose(profile["neurons"] * this.layer.shape.ffn.per_token, steps, rtol=1e-3)


def model_of(model_type: str):
    options = {name: value for name, value in MIXTURES[model_type].items() if name not in ("width", "kv_heads")}
    first = {
        "deepseek_v3": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
        "qwen2_moe": {"mlp_only_layers": (0,)},
    }
    return tiny(model_type, num_hidden_layers=4, **options | first[model_type])


def profiles_of(model, scales=(1.0, 4.0, 0.1)):
    """Of layers that cost as much as their scale says."""
    rising = torch.linspace(0.1, 1, WIDTH) ** 2
    mixtures = iter(scales)
    found = []
    for shape in model.dense_shapes:
        if not hasattr(shape.ffn, "count"):
            found.append({})
            continue
        costs = next(mixtures) * rising
        found.append(
            {"neurons": costs, "experts.neurons": costs.expand(EXPERTS, -1), "shared.neurons": torch.zeros(2 * WIDTH)}
        )
    return found


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_of_all_widths_that_meet_the_target_the_cheapest_are_chosen(model_type, sparsity):
    model = model_of(model_type)
    target, profiles = Target(model, sparsity), profiles_of(model)
    method = Heapr()
    method.check_target(target, 8)
    plan, dense = method.plan(target, profiles, 8), model.dense_shapes
    assert plan[0] == dense[0]
    assert all(after == before.with_ffn(width=after.ffn.width) for before, after in zip(dense, plan, strict=True))
    widths = [shape.ffn.width for shape in plan[1:]]

    def cost(widths) -> float:
        per_token = dense[1].ffn.per_token
        return sum(per_token * float(profiles[i + 1]["neurons"][: WIDTH - width].double().sum())
                   for i, width in enumerate(widths))  # fmt: skip

    def amount(widths) -> int:
        return target.amount([dense[0], *(s.with_ffn(width=w) for s, w in zip(dense[1:], widths, strict=True))])

    choices = [(a, b, c) for a in QUARTERS for b in QUARTERS for c in QUARTERS]
    best = min(cost(choice) for choice in choices if amount(choice) <= target.remaining)
    assert amount(widths) <= target.remaining
    assert cost(widths) == pytest.approx(best) == plan.predicted_loss
    assert widths[2] <= widths[0] <= widths[1]  # what is cheap goes, wherever it is


def test_a_target_beyond_the_experts_is_refused():
    with pytest.raises(InputError, match=r"budget of .* can't be reached.*lower --sparsity"):
        Heapr().check_target(Target(model_of("qwen2_moe"), 0.9), 8)


def test_nothing_goes_of_a_layer_without_experts(subject):
    this = subject("llama")
    method = Heapr()
    assert not method.gradient_moments(this.layer.shape) and this.profile(method) == {}
    assert this.prune(method, this.layer.shape) == this.layer
