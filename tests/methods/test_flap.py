"""FLAP: its scores, its threshold and its biases, against float64 on the activations themselves."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from distprune.budgets import Target, decoder_parameters
from distprune.decoder_layer import Linear
from distprune.errors import InputError
from distprune.methods.flap import Flap, fluctuation
from distprune.modeling import PrunedConfig, PrunedForCausalLM

ALIGN = 8
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


def profile_of(subject):
    method = Flap()
    return method.profile(subject.layer, subject.statistics(method.dense_moments(subject.layer.shape)))


def prune(subject, planned, **options):
    method = Flap(**options)
    statistics = subject.statistics(method.pruning_moments(subject.layer.shape, planned))
    pruned = method.prune(subject.layer, planned, statistics, profile_of(subject), subject.observe)
    assert pruned.shape == planned
    return pruned


def smaller(subject, groups: int = 0, neurons: int = 0, compensation: bool = True):
    """The layer's shape without that many KV groups and neurons, and with the biases that make up for them."""
    dense = subject.layer.shape
    kept, per_group = dense.kv_heads - groups, dense.query_heads // dense.kv_heads
    return replace(
        dense,
        kv_heads=kept,
        query_heads=kept * per_group,
        ffn_width=dense.ffn_width - neurons,
        output_bias=dense.output_bias or (compensation and groups > 0),
        down_bias=dense.down_bias or compensation,
    )


def standard(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean()) / scores.std(ddof=1)


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize(("role", "tap"), [("output", "attention_values"), ("down", "ffn_neurons")])
def test_a_channel_fluctuates_by_its_variance_and_its_column(any_subject, role, tap):
    projection, inputs = getattr(any_subject.layer, role), any_subject.activations()[tap].numpy()
    statistics = any_subject.statistics(Flap().dense_moments(any_subject.layer.shape))
    expected = inputs.var(axis=0) * np.linalg.norm(projection.weight.double().numpy(), axis=0) ** 2
    np.testing.assert_allclose(fluctuation(projection, statistics, tap), expected, rtol=1e-4)


def test_scores_are_standardized_over_channels_and_averaged_over_a_groups_heads(any_subject):
    layer, taps = any_subject.layer, any_subject.activations()

    def metric(projection: Linear, tap: str) -> np.ndarray:
        return taps[tap].numpy().var(axis=0, ddof=1) * (projection.weight.double().numpy() ** 2).sum(axis=0)

    channels = standard(metric(layer.output, "attention_values") ** 2)
    groups = [part.mean() for part in np.split(channels, layer.kv_heads)]
    found = profile_of(any_subject)
    np.testing.assert_allclose(found["groups"], groups, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["neurons"], standard(metric(layer.down, "ffn_neurons")), rtol=1e-3, atol=1e-4)


def test_the_units_of_the_highest_scores_stay(any_subject):
    layer, profile = any_subject.layer, profile_of(any_subject)
    pruned = prune(any_subject, smaller(any_subject, groups=min(1, layer.kv_heads - 1), neurons=17))
    neurons = np.sort(np.argsort(profile["neurons"].numpy())[17:])
    for role in ("gate", "up"):
        assert torch.equal(getattr(pruned, role).weight, getattr(layer, role).weight[neurons])
    assert torch.equal(pruned.down.weight, layer.down.weight[:, neurons])
    groups = np.sort(np.argsort(profile["groups"].numpy())[layer.kv_heads - pruned.kv_heads :])
    values = layer.value.weight.unflatten(0, (layer.kv_heads, -1))[groups].flatten(0, 1)
    assert torch.equal(pruned.value.weight, values)


def test_scores_of_a_silent_module_are_numbers(subject):
    this = subject(biases=False)
    silent = replace(this, layer=replace(this.layer, gate=Linear(torch.zeros_like(this.layer.gate.weight))))
    assert torch.equal(profile_of(silent)["neurons"], torch.zeros(40))


# ------------------------------------------------------------------ biases


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize("compensation", [True, False])
def test_compensation_keeps_the_mean_of_attentions_output(subject, biases, query_heads, kv_heads, compensation):
    this = subject(query_heads=query_heads, kv_heads=kv_heads, biases=biases)
    pruned = prune(this, smaller(this, kv_heads - 1, 10, compensation), compensation=compensation)
    means = [this.activations(layer)["attention_output"].mean(dim=0) for layer in (this.layer, pruned)]
    assert torch.allclose(*means, rtol=1e-5, atol=1e-6) == compensation


@pytest.mark.parametrize("compensation", [True, False])
def test_compensation_keeps_the_mean_of_the_ffns_output(any_subject, compensation):
    pruned = prune(any_subject, smaller(any_subject, 0, 25, compensation), compensation=compensation)
    means = [any_subject.activations(layer)["ffn_output"].mean(dim=0) for layer in (any_subject.layer, pruned)]
    assert torch.allclose(*means, rtol=1e-5, atol=1e-6) == compensation
    assert torch.equal(pruned.output.weight, any_subject.layer.output.weight)


def test_constant_neurons_go_first_and_leave_no_trace(subject):
    """Neurons whose gate and up projections are biases alone."""
    this, constant = subject(biases=True), 10

    def without_input(projection: Linear) -> Linear:
        return Linear(projection.weight.clone().index_fill_(0, torch.arange(constant), 0.0), projection.bias)

    layer = replace(this.layer, gate=without_input(this.layer.gate), up=without_input(this.layer.up))
    these = replace(this, layer=layer)
    pruned = prune(these, smaller(these, neurons=constant))
    assert torch.equal(pruned.gate.weight, layer.gate.weight[constant:])
    assert not torch.allclose(pruned.down.bias, layer.down.bias)
    torch.testing.assert_close(these.run(pruned), these.run(layer))


def test_a_layer_that_loses_nothing_is_unchanged(any_subject):
    layer = any_subject.layer
    assert (
        Flap().prune(layer, layer.shape, any_subject.statistics([]), profile_of(any_subject), any_subject.observe)
        is layer
    )


# ------------------------------------------------------------------ the budget


def config_of(layers: int = 6, **changes) -> PrunedConfig:
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 160,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "vocab_size": 16,
    }
    return PrunedConfig(**sizes | changes, num_hidden_layers=layers)


def random_profiles(config: PrunedConfig, seed: int = 0, lift: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """Scores from normal distributions, those of the groups raised by ``lift``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "groups": torch.randn(config.num_key_value_heads, generator=generator) + lift,
            "neurons": torch.randn(config.intermediate_size, generator=generator),
        }
        for _ in range(config.num_hidden_layers)
    ]


def units_below_one_threshold(config, profiles, excess: int) -> tuple[list[int], list[int]]:
    """Groups and neurons left of every layer when the lowest units of all layers go, one after the other."""
    per_group = 32 * (16 + 8 + 8 + 16) + config.attention_bias * (16 + 8 + 8)
    per_neuron = 3 * 32 + config.mlp_bias * 2
    units = []
    for index, profile in enumerate(profiles):
        for module, cost, least in (("groups", per_group, 1), ("neurons", per_neuron, ALIGN)):
            expendable = sorted(profile[module].tolist())[:-least]
            units += [(score, index, module, cost) for score in expendable]
    left = {"groups": [4] * len(profiles), "neurons": [160] * len(profiles)}
    for _, index, module, cost in sorted(units):
        excess -= cost
        if excess < 0:
            break
        left[module][index] -= 1
    return left["groups"], left["neurons"]


@pytest.mark.parametrize("biases", [{}, BIASES], ids=["no biases", "biases"])
@pytest.mark.parametrize("seed", range(4))
def test_one_threshold_over_all_layers_divides_the_budget(biases, seed):
    config = config_of(**biases)
    profiles, target = random_profiles(config, seed), Target(config, 0.4)
    added = 0 if biases else 6 * 2 * 32
    groups, neurons = units_below_one_threshold(config, profiles, target.dense + added - target.remaining)
    plan = Flap().plan(target, profiles, ALIGN)
    assert [shape.kv_heads for shape in plan] == groups
    assert len(set(groups)) > 1
    scale = sum(shape.ffn_width for shape in plan) / sum(neurons)
    for shape, count in zip(plan, neurons, strict=True):
        assert abs(shape.ffn_width - scale * count) <= ALIGN


@pytest.mark.parametrize("biases", [{}, BIASES], ids=["no biases", "biases"])
@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("sparsity", [0.02, 0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("lift", [-9.0, 0.0, 9.0], ids=["groups first", "either", "neurons first"])
def test_the_plan_meets_the_target_with_all_biases_counted(biases, compensation, sparsity, lift):
    config = config_of(**biases)
    target = Target(config, sparsity)
    plan = Flap(compensation=compensation).plan(target, random_profiles(config, lift=lift), ALIGN)
    assert all(shape.ffn_width % ALIGN == 0 and 1 <= shape.kv_heads <= 4 for shape in plan)
    assert all(shape.query_heads == 2 * shape.kv_heads for shape in plan)

    model = PrunedForCausalLM(config_of(**biases, layer_shapes=[asdict(shape) for shape in plan]))
    left = sum(parameter.numel() for parameter in model.model.layers.parameters())
    assert left == decoder_parameters(config, plan)
    assert abs(left - target.remaining) <= ALIGN * (3 * 32 + 2)
    for shape, layer in zip(plan, model.model.layers, strict=True):
        lost = compensation and shape.kv_heads < 4
        assert (layer.self_attn.o_proj.bias is not None) == (bool(biases) or lost)
        assert (layer.mlp.down_proj.bias is not None) == (bool(biases) or compensation)


def test_embeddings_that_count_are_paid_for():
    config = config_of(vocab_size=200)
    target = Target(config, 0.3, count_embeddings=True)
    plan = Flap().plan(target, random_profiles(config), ALIGN)
    assert abs(decoder_parameters(config, plan) - target.remaining) <= ALIGN * (3 * 32 + 2)


def test_at_sparsity_zero_nothing_goes():
    config = config_of()
    assert Flap().plan(Target(config, 0.0), random_profiles(config), ALIGN) == [config.dense_shape()] * 6


def test_a_target_below_the_smallest_layers_is_refused_before_any_profile():
    config = config_of(intermediate_size=16)
    with pytest.raises(InputError, match=r"sparsity 0\.9"):
        Flap().check_target(Target(config, 0.9), ALIGN)
    Flap().check_target(Target(config, 0.5), ALIGN)
