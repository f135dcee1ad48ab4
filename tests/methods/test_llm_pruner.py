"""LLM-Pruner's importance and budget, against the whole model's loss and PyTorch's own gradients of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gradients import with_gradients
from tiny_architectures import tiny
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig

from distprune.budgets import Target, decoder_parameters
from distprune.errors import InputError
from distprune.layers.shapes import LayerShape
from distprune.methods.even_layers import with_heads
from distprune.methods.llm_pruner import LLMPruner
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons


def importance_of_units(module: nn.Module, kv_heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Sums of |w·∂L/∂w|, weight by weight in float64, for a decoder layer that holds gradients."""

    def worth(projection: nn.Linear) -> np.ndarray:
        weight = projection.weight
        return np.abs(weight.detach().double().numpy() * weight.grad.double().numpy())

    attention = module.self_attn
    groups = sum(
        np.array([part.sum() for part in np.split(worth(projection), kv_heads, axis=axis)])
        for projection, axis in (
            (attention.q_proj, 0),
            (attention.k_proj, 0),
            (attention.v_proj, 0),
            (attention.o_proj, 1),
        )
    )
    return groups, importance_of_neurons(module.mlp, worth)


def importance_of_neurons(ffn: nn.Module, worth) -> np.ndarray:
    *inputs, down = [module for module in ffn.children() if isinstance(module, nn.Linear)]
    return sum(worth(projection).sum(axis=1) for projection in inputs) + worth(down).sum(axis=0)


def test_a_unit_is_worth_what_its_weights_are(any_subject):
    profile = any_subject.profile(LLMPruner())
    groups, neurons = importance_of_units(with_gradients(any_subject), any_subject.attention.kv_heads)
    np.testing.assert_allclose(profile["groups"], groups, rtol=1e-3)
    np.testing.assert_allclose(profile["neurons"], neurons, rtol=1e-3)


def test_neurons_without_a_gate_are_worth_what_their_two_vectors_are(gateless):
    profile = gateless.profile(LLMPruner())
    groups, neurons = importance_of_units(with_gradients(gateless), gateless.attention.kv_heads)
    np.testing.assert_allclose(profile["groups"], groups, rtol=1e-3)
    np.testing.assert_allclose(profile["neurons"], neurons, rtol=1e-3)


def test_the_best_units_stay_and_stay_as_they_are(any_subject):
    attention, method = any_subject.attention, LLMPruner()
    groups, neurons = importance_of_units(with_gradients(any_subject), attention.kv_heads)
    left, heads_each = max(1, attention.kv_heads - 1), attention.query_heads // attention.kv_heads
    best = lambda scores, keep: torch.from_numpy(np.sort(np.argsort(scores)[-keep:]))  # noqa: E731
    heads = heads_of_groups(best(groups, left), heads_each)
    expected = any_subject.run_with(
        attention=keep_heads(attention, heads), ffn=keep_neurons(any_subject.ffn, best(neurons, 24))
    )
    planned = with_heads(any_subject.layer.shape, left, heads_each).with_ffn(width=24)
    assert method.pruning_moments(any_subject.layer.shape, planned) == ()
    assert torch.equal(any_subject.run(any_subject.prune(method, planned)), expected)


def test_what_is_worth_little_changes_the_loss_little():
    """The sense of it all: to first order, the loss without a neuron differs by no more than its importance."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, head_dim=8
    )
    model, tokens = AutoModelForCausalLM.from_config(config).eval(), torch.randint(40, (6, 10))

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
    return Target(tiny(num_hidden_layers=layers, vocab_size=100, **sizes), sparsity)


def whole_layers(plan: list[LayerShape], dense: list[LayerShape]) -> list[int]:
    return [index for index, shape in enumerate(plan) if shape == dense[index]]


@pytest.mark.parametrize("sparsity", [0.1, 0.3, 0.5])
def test_the_first_and_last_layers_stay_whole_and_the_others_lose_alike(sparsity):
    goal = target(32, sparsity)
    plan = LLMPruner().plan(goal, (), align=8)
    assert whole_layers(plan, goal.dense_shapes) == [0, 1, 2, 3, 30, 31]
    pruned = plan[4:30]
    assert len({shape.attention.kv_heads for shape in pruned}) == 1
    assert max(shape.ffn.width for shape in pruned) - min(shape.ffn.width for shape in pruned) <= 8
    assert abs(decoder_parameters(goal.model, plan) - goal.remaining) <= 3 * 8 * 64


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
