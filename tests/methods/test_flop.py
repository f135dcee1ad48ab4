"""FLOP's gates: where they are in a layer, their gradients, and what a plan and a pruned layer make of them."""

from __future__ import annotations

import pytest
import torch
from mixture_layers import MIXTURES
from tiny_architectures import tiny
from torch import Tensor

from distprune.budgets import Target
from distprune.errors import InputError
from distprune.methods.flop import START, Flop, gate_sizes
from distprune.methods.units import keep_neurons, keep_values
from distprune.statistics import LayerStatistics

METHOD = Flop()


def random_gates(shape, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size in gate_sizes(shape).items()}


def loss(subject, layer) -> float:
    """Half the squared norm of the layer's output, whose gradient is the output."""
    return subject.run(layer).double().square().sum().item() / 2


def gradients(subject, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    ungated = METHOD.with_diagonals(subject.layer, subject.profile(METHOD))
    statistics = subject.statistics(METHOD.gate_moments(subject.layer.shape), METHOD.gated(ungated, gates))
    return dict(METHOD.gate_gradients(ungated, statistics))


def test_diagonals_leave_the_function_as_it_is(any_subject):
    turned = METHOD.with_diagonals(any_subject.layer, any_subject.profile(METHOD))
    assert not torch.equal(turned.attention.value.weight, any_subject.attention.value.weight)
    expected = any_subject.run(any_subject.layer)
    torch.testing.assert_close(any_subject.run(turned), expected, rtol=1e-4, atol=1e-4)
    ones = {name: torch.ones(size) for name, size in gate_sizes(any_subject.layer.shape).items()}
    torch.testing.assert_close(any_subject.run(METHOD.gated(turned, ones)), expected, rtol=1e-4, atol=1e-4)


def test_closed_gates_are_as_if_their_units_had_gone(any_subject):
    turned, shape = METHOD.with_diagonals(any_subject.layer, any_subject.profile(METHOD)), any_subject.layer.shape
    groups = shape.attention.kv_heads
    kept = torch.stack([torch.arange(8)[torch.arange(8) != group % 8] for group in range(groups)])
    values = torch.zeros(groups, 8).scatter(1, kept, 1.0)
    neurons = torch.ones(40)
    neurons[[3, 17]] = 0
    gated = METHOD.gated(turned, {"values": values, "neurons": neurons})
    ffn = keep_neurons(turned.ffn, neurons.nonzero().flatten())
    expected = any_subject.run_with(attention=keep_values(turned.attention, kept), ffn=ffn)
    torch.testing.assert_close(any_subject.run(gated), expected, rtol=1e-4, atol=1e-4)


def test_rotated_values_come_by_falling_worth_to_the_output(any_subject):
    """Without the first of them the output of attention changes most, and without the last least."""
    turned = METHOD.with_diagonals(any_subject.layer, any_subject.profile(METHOD))
    dense, groups = any_subject.run(any_subject.layer), any_subject.attention.kv_heads

    def error(value: int) -> float:
        gates = torch.ones(groups, 8)
        gates[:, value] = 0
        return (any_subject.run(METHOD.gated(turned, {"values": gates})) - dense).norm().item()

    assert error(0) > error(3) > error(7)


def check_gradients(subject, gates: dict[str, Tensor], places: int = 3) -> None:
    """Against differences of the loss."""
    found = gradients(subject, gates)
    ungated = METHOD.with_diagonals(subject.layer, subject.profile(METHOD))
    for name, gate in gates.items():
        flat = gate.flatten()
        for place in torch.linspace(0, len(flat) - 1, places).long().tolist():
            at = []
            for step in (-0.02, 0.02):
                moved = flat.clone()
                moved[place] += step
                at.append(loss(subject, METHOD.gated(ungated, gates | {name: moved.view(gate.shape)})))
            slope = (at[1] - at[0]) / 0.04
            assert found[name].flatten()[place].item() == pytest.approx(slope, rel=0.02, abs=0.05), (name, place)


def test_a_gates_gradient_is_the_slope_of_the_loss(any_subject):
    check_gradients(any_subject, random_gates(any_subject.layer.shape))


def test_it_is_without_a_gate_too(gateless):
    check_gradients(gateless, random_gates(gateless.layer.shape))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_it_is_of_every_expert_and_of_what_is_shared(subject, model_type):
    this = subject(model_type, **MIXTURES[model_type])
    gates = random_gates(this.layer.shape)
    assert ("shared.neurons" in gates) == (model_type != "gpt_oss")
    gates.pop("values", None)  # they change which experts are chosen, where the loss has no slope
    check_gradients(this, gates, places=5)


# ---------------------------------------------------------------- plans


def profiles_of(model, **log_alpha: list[float]) -> list[dict[str, Tensor]]:
    """Gates of one log α in each layer."""
    sizes = gate_sizes(model.dense_shape(0))
    return [
        {name: torch.full(size, log_alpha[name][index] if name in log_alpha else START) for name, size in sizes.items()}
        for index in range(model.num_layers)
    ]


def test_a_layer_keeps_what_its_gates_expect_to_stay_open():
    model = tiny(num_hidden_layers=3, intermediate_size=200, head_dim=32)
    target = Target(model, 0.3)
    plan = METHOD.plan(target, profiles_of(model, neurons=[-3.0, 0.0, 3.0], values=[3.0, -2.4, 0.0]), align=4)
    widths, values = [shape.ffn.width for shape in plan], [shape.attention.value_dim for shape in plan]
    assert widths[0] < widths[1] < widths[2] and values[1] < values[2] < values[0]
    step = 3 * 4 * model.hidden_size
    assert abs(target.amount(plan) - target.remaining) <= step / 2


def test_where_the_gates_have_met_the_target_the_plan_is_what_they_say():
    model = tiny(num_hidden_layers=2, intermediate_size=200)
    logit = lambda open: float(torch.logit(torch.tensor(open))) - float(torch.log(torch.tensor(11.0)))  # noqa: E731
    wanted = [0.5, 0.9]
    profiles = profiles_of(model, neurons=[logit(share) for share in wanted], values=[20.0, 20.0])
    gone = 3 * model.hidden_size * 200 * sum(1 - share for share in wanted)
    target = Target(model, gone / Target(model, 0).dense)
    plan = METHOD.plan(target, profiles, align=1)
    assert [shape.ffn.width for shape in plan] == pytest.approx([100, 180], abs=1)
    assert all(shape.attention == model.dense_shape(0).attention for shape in plan)


def test_gates_take_what_their_unit_takes(subject):
    model = tiny(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    amounts = METHOD.gate_amounts(Target(model, 0.3), 0)
    assert amounts == {"neurons": 3 * model.hidden_size, "values": (1 + 2) * model.hidden_size}
    assert set(METHOD.gate_amounts(Target(model, 0.3, layout="heterogeneous"), 0)) == {"neurons"}


def test_a_target_below_what_no_gate_is_in_front_of_is_refused():
    with pytest.raises(InputError, match=r"sparsity 0\.95 can't be reached"):
        METHOD.check_target(Target(tiny(), 0.95), 8)


# ---------------------------------------------------------------- pruned layers


def test_the_units_of_the_most_open_gates_stay(any_subject):
    shape = any_subject.layer.shape
    profile = any_subject.profile(METHOD) | random_gates(shape, seed=5)
    planned = shape.with_attention(value_dim=5).with_ffn(width=24)
    best = lambda gates, keep: gates.argsort(dim=-1)[..., gates.shape[-1] - keep :].sort(dim=-1).values  # noqa: E731
    turned = METHOD.with_diagonals(any_subject.layer, profile)
    attention = keep_values(turned.attention, best(profile["values"], 5))
    ffn = keep_neurons(any_subject.ffn, best(profile["neurons"], 24))
    expected = any_subject.run_with(attention=attention, ffn=ffn)
    assert torch.equal(any_subject.run(any_subject.prune(METHOD, planned, profile)), expected)


def test_values_that_all_stay_are_not_rotated(any_subject):
    planned = any_subject.layer.shape.with_ffn(width=24)
    assert any_subject.prune(METHOD, planned).attention is any_subject.attention


def test_no_moments_are_asked_for_when_a_layer_is_pruned(any_subject):
    shape = any_subject.layer.shape
    assert METHOD.pruning_moments(shape, shape) == ()
    assert LayerStatistics(METHOD.pruning_moments(shape, shape)).to_values(()) == {}
