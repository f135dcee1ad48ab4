"""LLM-Pruner's importance and budget, against the whole model's loss and PyTorch's own gradients of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from distprune import InputError
from distprune.budgets import Target, decoder_parameters
from distprune.forward import LayerRunner
from distprune.methods.llm_pruner import LLMPruner
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.modeling import LayerShape, PrunedConfig, PrunedForCausalLM
from distprune.statistics import LayerStatistics


def importance_of_units(module: nn.Module, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of |w·∂L/∂w|, weight by weight in float64, for a decoder layer that holds gradients."""

    def worth(projection: nn.Linear) -> np.ndarray:
        weight = projection.weight
        return np.abs(weight.detach().double().numpy() * weight.grad.double().numpy())

    attention, ffn = module.self_attn, module.mlp
    groups = sum(
        np.array([part.sum() for part in np.split(worth(projection), kv_heads, axis=axis)])
        for projection, axis in (
            (attention.q_proj, 0),
            (attention.k_proj, 0),
            (attention.v_proj, 0),
            (attention.o_proj, 1),
        )
    )
    neurons = worth(ffn.gate_proj).sum(axis=1) + worth(ffn.up_proj).sum(axis=1) + worth(ffn.down_proj).sum(axis=0)
    return groups, neurons


@pytest.fixture
def profiled(any_subject):
    """A layer, its profile, and a module that holds the same loss's gradients: half the output's squared norm."""
    this, method = any_subject, LLMPruner()
    statistics = this.statistics(method.gradient_moments(this.layer.shape))
    runner = LayerRunner(this.config, torch.device("cpu"), torch.float32, 3)
    module = runner.build(this.layer, 0, torch.float32)
    (runner.forward(module, 0, this.hidden_states).square().sum() / 2).backward()
    return this, method, method.profile(this.layer, statistics), module


def test_a_unit_is_worth_what_its_weights_are(profiled):
    this, _, profile, module = profiled
    groups, neurons = importance_of_units(module, this.layer.kv_heads)
    np.testing.assert_allclose(profile["groups"], groups, rtol=1e-3)
    np.testing.assert_allclose(profile["neurons"], neurons, rtol=1e-3)


def test_the_best_units_stay_and_stay_as_they_are(profiled):
    this, method, profile, module = profiled
    layer = this.layer
    groups, neurons = importance_of_units(module, layer.kv_heads)
    left, heads_each = max(1, layer.kv_heads - 1), layer.query_heads // layer.kv_heads
    best = lambda scores, keep: torch.from_numpy(np.sort(np.argsort(scores)[-keep:]))  # noqa: E731
    expected = keep_neurons(keep_heads(layer, heads_of_groups(best(groups, left), heads_each)), best(neurons, 24))
    planned = replace(layer.shape, kv_heads=left, query_heads=left * heads_each, ffn_width=24)
    assert method.pruning_moments(layer.shape, planned) == ()
    pruned = method.prune(layer, planned, LayerStatistics(()), profile, this.observe)
    assert pruned.shape == planned
    assert torch.equal(this.run(pruned), this.run(expected))


def test_what_is_worth_little_changes_the_loss_little():
    """The sense of it all: to first order, the loss without a neuron differs by no more than its importance."""
    torch.manual_seed(0)
    config = PrunedConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    model, tokens = PrunedForCausalLM(config).eval(), torch.randint(40, (6, 10))

    def loss() -> torch.Tensor:
        return cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum")

    loss().backward()
    ffn = model.model.layers[0].mlp
    _, neurons = importance_of_units(model.model.layers[0], config.num_key_value_heads)
    with torch.no_grad():
        whole = loss().item()
        for neuron in range(24):
            shrunk = ffn.down_proj.weight[:, neuron].clone()
            ffn.down_proj.weight[:, neuron] *= 0.99
            assert abs(loss().item() - whole) <= 0.01 * neurons[neuron] + 1e-3
            ffn.down_proj.weight[:, neuron] = shrunk


# ------------------------------------------------------------------ the budget


def target(layers: int, sparsity: float) -> Target:
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4}
    return Target(PrunedConfig(num_hidden_layers=layers, vocab_size=100, **sizes), sparsity)


def whole_layers(plan: list[LayerShape], dense: list[LayerShape]) -> list[int]:
    return [index for index, shape in enumerate(plan) if shape == dense[index]]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_the_first_and_last_layers_stay_whole_and_the_others_lose_alike(sparsity):
    goal = target(32, sparsity)
    plan = LLMPruner().plan(goal, (), align=8)
    assert whole_layers(plan, goal.dense_shapes) == [0, 1, 2, 3, 30, 31]
    pruned = plan[4:30]
    assert len({shape.kv_heads for shape in pruned}) == 1
    assert max(shape.ffn_width for shape in pruned) - min(shape.ffn_width for shape in pruned) <= 8
    assert abs(decoder_parameters(goal.config, plan) - goal.remaining) <= 3 * 8 * 64


def test_all_layers_lose_where_none_is_to_stay_whole():
    goal = target(32, 0.3)
    plan = LLMPruner(first_layers=0, last_layers=0).plan(goal, (), align=8)
    assert whole_layers(plan, goal.dense_shapes) == []


def test_at_sparsity_zero_everything_stays():
    goal = target(32, 0.0)
    assert LLMPruner().plan(goal, (), align=8) == goal.dense_shapes


@pytest.mark.parametrize(("sparsity", "options"), [(0.85, {}), (0.2, {"first_layers": 0.9}), (0.2, {"last_layers": 1})])
def test_more_than_the_other_layers_hold_is_refused(sparsity, options):
    with pytest.raises(InputError, match=r"can't be reached.*--sparsity"):
        LLMPruner(**options).check_target(target(32, sparsity), align=8)
