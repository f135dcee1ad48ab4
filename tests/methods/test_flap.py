"""FLAP: its scores, its threshold and its biases, against float64 on the activations themselves."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_architectures import BIASES, tiny

from distprune.budgets import Target, decoder_parameters, is_heterogeneous
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.layers.parts import Linear
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import ATTENDED, ATTENTION_OUTPUT, FFN_OUTPUT, NEURONS, Site
from distprune.methods.even_layers import with_heads
from distprune.methods.flap import Flap, fluctuation

ALIGN = 8


def smaller(subject, groups: int = 0, neurons: int = 0, compensation: bool = True) -> LayerShape:
    """The layer's shape without that many KV groups and neurons, and with the biases that make up for them."""
    dense = subject.layer.shape
    shape = with_heads(dense, dense.attention.kv_heads - groups, dense.attention.heads_per_group)
    shape = shape.with_ffn(width=dense.ffn.width - neurons, down_bias=dense.ffn.down_bias or compensation)
    return shape.with_attention(output_bias=dense.attention.output_bias or (compensation and groups > 0))


def standard(scores: np.ndarray) -> np.ndarray:
    return (scores - scores.mean()) / scores.std(ddof=1)


# ------------------------------------------------------------------ scores


@pytest.mark.parametrize("site", [ATTENDED, NEURONS], ids=str)
def test_a_channel_fluctuates_by_its_variance_and_its_column(any_subject, site):
    projection = any_subject.attention.output if site == ATTENDED else any_subject.ffn.down
    inputs = any_subject.activations()[site].numpy()
    statistics = any_subject.statistics(Flap().dense_moments(any_subject.layer.shape))
    expected = inputs.var(axis=0) * np.linalg.norm(projection.weight.double().numpy(), axis=0) ** 2
    np.testing.assert_allclose(fluctuation(projection, statistics, site), expected, rtol=1e-4)


def metric(subject, projection: Linear, site: Site) -> np.ndarray:
    inputs = subject.activations()[site].numpy()
    return inputs.var(axis=0, ddof=1) * (projection.weight.double().numpy() ** 2).sum(axis=0)


def test_scores_are_standardized_over_channels_and_averaged_over_a_groups_heads(any_subject):
    channels = standard(metric(any_subject, any_subject.attention.output, ATTENDED) ** 2)
    groups = [part.mean() for part in np.split(channels, any_subject.attention.kv_heads)]
    found = any_subject.profile(Flap())
    np.testing.assert_allclose(found["groups"], groups, rtol=1e-3, atol=1e-4)
    neurons = standard(metric(any_subject, any_subject.ffn.down, NEURONS))
    np.testing.assert_allclose(found["neurons"], neurons, rtol=1e-3, atol=1e-4)


def test_the_units_of_the_highest_scores_stay(any_subject):
    attention, ffn, profile = any_subject.attention, any_subject.ffn, any_subject.profile(Flap())
    pruned = any_subject.prune(Flap(), smaller(any_subject, groups=min(1, attention.kv_heads - 1), neurons=17))
    neurons = np.sort(np.argsort(profile["neurons"].numpy())[17:])
    for before, after in zip(ffn.inputs, pruned.ffn.inputs, strict=True):
        assert torch.equal(after.weight, before.weight[neurons])
    assert torch.equal(pruned.ffn.down.weight, ffn.down.weight[:, neurons])
    groups = np.sort(np.argsort(profile["groups"].numpy())[attention.kv_heads - pruned.attention.kv_heads :])
    values = attention.value.weight.unflatten(0, (attention.kv_heads, -1))[groups].flatten(0, 1)
    assert torch.equal(pruned.attention.value.weight, values)


def test_scores_of_a_silent_module_are_numbers(subject):
    this = subject(biases=False)
    silent = this.changed(ffn=replace(this.ffn, gate=Linear(torch.zeros_like(this.ffn.gate.weight))))
    assert torch.equal(silent.profile(Flap())["neurons"], torch.zeros(40))


# ------------------------------------------------------------------ biases


@pytest.mark.parametrize("biases", [True, False], ids=["biases", "no biases"])
@pytest.mark.parametrize(("query_heads", "kv_heads"), [(4, 4), (4, 2), (6, 3)])
@pytest.mark.parametrize("compensation", [True, False])
def test_compensation_keeps_the_mean_of_attentions_output(subject, biases, query_heads, kv_heads, compensation):
    this = subject(query_heads=query_heads, kv_heads=kv_heads, biases=biases)
    planned = smaller(this, kv_heads - 1, 10, compensation)
    assert keeps_mean(this, ATTENTION_OUTPUT, planned, compensation) == compensation


def keeps_mean(this, site: Site, planned: LayerShape, compensation: bool) -> bool:
    pruned = this.prune(Flap(compensation=compensation), planned)
    means = [this.activations(layer)[site].mean(dim=0) for layer in (this.layer, pruned)]
    return torch.allclose(*means, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("compensation", [True, False])
def test_compensation_keeps_the_mean_of_the_ffns_output(any_subject, compensation):
    planned = smaller(any_subject, 0, 25, compensation)
    assert keeps_mean(any_subject, FFN_OUTPUT, planned, compensation) == compensation
    assert any_subject.prune(Flap(compensation=compensation), planned).attention is any_subject.attention


def test_compensation_keeps_the_mean_of_an_ffn_without_a_gate(gateless):
    """Nothing else in the layer lies between the neurons' mean and the output's."""
    assert keeps_mean(gateless, FFN_OUTPUT, smaller(gateless, 0, 25), True)


def test_constant_neurons_go_first_and_leave_no_trace(subject):
    """Neurons whose gate and up projections are biases alone."""
    this, constant = subject(biases=True), 10

    def without_input(projection: Linear) -> Linear:
        return Linear(projection.weight.clone().index_fill_(0, torch.arange(constant), 0.0), projection.bias)

    ffn = replace(this.ffn, gate=without_input(this.ffn.gate), up=without_input(this.ffn.up))
    these = this.changed(ffn=ffn)
    pruned = these.prune(Flap(), smaller(these, neurons=constant))
    assert torch.equal(pruned.ffn.gate.weight, ffn.gate.weight[constant:])
    assert not torch.allclose(pruned.ffn.down.bias, ffn.down.bias)
    torch.testing.assert_close(these.run(pruned), these.run(these.layer))


def test_a_layer_that_loses_nothing_is_unchanged(any_subject):
    pruned = any_subject.prune(Flap(), any_subject.layer.shape)
    assert pruned.attention is any_subject.attention and pruned.ffn is any_subject.ffn


# ------------------------------------------------------------------ the budget


def model_of(layers: int = 6, **changes) -> Architecture:
    sizes = {"hidden_size": 32, "intermediate_size": 160, "num_attention_heads": 8, "num_key_value_heads": 4}
    return tiny(**sizes | {"vocab_size": 16} | changes, num_hidden_layers=layers)


def random_profiles(model: Architecture, seed: int = 0, lift: float = 0.0) -> list[dict[str, torch.Tensor]]:
    """Scores from normal distributions, those of the groups raised by ``lift``."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "groups": torch.randn(4, generator=generator) + lift,
            "neurons": torch.randn(160, generator=generator),
        }
        for _ in range(model.num_layers)
    ]


def units_below_one_threshold(model, profiles, excess: int) -> tuple[list[int], list[int]]:
    """Groups and neurons left of every layer when the lowest units of all layers go, one after the other."""
    per_group = 32 * (16 + 8 + 8 + 16) + model.config.attention_bias * (16 + 8 + 8)
    per_neuron = 3 * 32 + model.config.mlp_bias * 2
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
    model = model_of(**biases)
    profiles, target = random_profiles(model, seed), Target(model, 0.4)
    added = 0 if biases else 6 * 2 * 32
    groups, neurons = units_below_one_threshold(model, profiles, target.dense + added - target.remaining)
    plan = Flap().plan(target, profiles, ALIGN)
    assert [shape.attention.kv_heads for shape in plan] == groups
    assert len(set(groups)) > 1
    scale = sum(shape.ffn.width for shape in plan) / sum(neurons)
    for shape, count in zip(plan, neurons, strict=True):
        assert abs(shape.ffn.width - scale * count) <= ALIGN


@pytest.mark.parametrize("biases", [{}, BIASES], ids=["no biases", "biases"])
@pytest.mark.parametrize("compensation", [True, False])
@pytest.mark.parametrize("sparsity", [0.02, 0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("lift", [-9.0, 0.0, 9.0], ids=["groups first", "either", "neurons first"])
def test_the_plan_meets_the_target_with_all_biases_counted(biases, compensation, sparsity, lift):
    model = model_of(**biases)
    target = Target(model, sparsity)
    plan = Flap(compensation=compensation).plan(target, random_profiles(model, lift=lift), ALIGN)
    assert all(shape.ffn.width % ALIGN == 0 and 1 <= shape.attention.kv_heads <= 4 for shape in plan)
    assert all(shape.attention.heads_per_group == 2 for shape in plan)
    assert abs(decoder_parameters(model, plan) - target.remaining) <= ALIGN * (3 * 32 + 2)
    for shape in plan:
        lost = compensation and shape.attention.kv_heads < 4
        assert shape.attention.output_bias == (bool(biases) or lost)
        assert shape.ffn.down_bias == (bool(biases) or compensation)
    assert is_heterogeneous(model, plan) == (bool(biases) or not compensation)


def test_a_layout_that_can_not_say_the_biases_is_refused_with_what_helps():
    free = Target(model_of(), 0.3, layout="heterogeneous")
    with pytest.raises(InputError, match=r"--layout heterogeneous: method flap adds biases.*compensation=false"):
        Flap().check_target(free, ALIGN)
    Flap(compensation=False).check_target(free, ALIGN)
    Flap().check_target(Target(model_of(**BIASES), 0.3, layout="heterogeneous"), ALIGN)


def test_heads_that_may_not_go_stay_and_the_neurons_pay():
    model = tiny("gpt_neox", num_hidden_layers=6)
    target, generator = Target(model, 0.3), torch.Generator().manual_seed(0)
    profiles = [
        {"groups": torch.randn(4, generator=generator) - 9, "neurons": torch.randn(96, generator=generator)}
        for _ in range(6)
    ]
    plan = Flap().plan(target, profiles, ALIGN)
    assert {shape.attention for shape in plan} == {model.dense_shape(0).attention}
    assert abs(decoder_parameters(model, plan) - target.remaining) <= ALIGN * (2 * 32 + 1)


def test_embeddings_that_count_are_paid_for():
    model = model_of(vocab_size=200)
    target = Target(model, 0.3, count_embeddings=True)
    plan = Flap().plan(target, random_profiles(model), ALIGN)
    assert abs(decoder_parameters(model, plan) - target.remaining) <= ALIGN * (3 * 32 + 2)


def test_at_sparsity_zero_nothing_goes():
    model = model_of()
    assert Flap().plan(Target(model, 0.0), random_profiles(model), ALIGN) == [model.dense_shape(0)] * 6


def test_a_target_below_the_smallest_layers_is_refused_before_any_profile():
    model = model_of(intermediate_size=16)
    with pytest.raises(InputError, match=r"sparsity 0\.9"):
        Flap().check_target(Target(model, 0.9), ALIGN)
    Flap().check_target(Target(model, 0.5), ALIGN)
