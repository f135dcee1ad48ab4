"""FLOP's gates: where they are in a layer, their gradients, and what a plan and a pruned layer make of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from mixture_layers import MIXTURES
from tiny_architectures import tiny
from torch import Tensor

from distprune.budgets import Target
from distprune.errors import InputError
from distprune.layers.parts import Experts
from distprune.layers.runner import LayerRunner
from distprune.methods.flop import START, Flop
from distprune.methods.units import keep_neurons, keep_values

METHOD = Flop()


def random_gates(subject, seed: int = 0) -> dict[str, Tensor]:
    """Values of all gates of a layer."""
    generator, profile = torch.Generator().manual_seed(seed), subject.profile(METHOD)
    names = METHOD.even_profile(subject.layer.shape)
    return {name: torch.rand(profile[name].shape, generator=generator) for name in names}


def with_diagonals(subject, *names: str):
    return METHOD.with_diagonals(subject.layer, subject.profile(METHOD), names)


def loss(subject, layer) -> float:
    """Half the squared norm of the layer's output, whose gradient is the output, except for norms and experts, of which
    there are float32 kernels alone, in float64."""
    dtype = torch.float32 if isinstance(layer.ffn, Experts) else torch.float64
    runner = LayerRunner(subject.model, torch.device("cpu"), dtype, micro_batch=8)
    return runner.run(layer, 0, subject.hidden_states.to(dtype)).double().square().sum().item() / 2


def gradients(subject, gates: dict[str, Tensor]) -> dict[str, Tensor]:
    ungated = with_diagonals(subject, *gates)
    moments = METHOD.gate_moments(subject.layer.shape, gates.keys())
    statistics = subject.statistics(moments, METHOD.gated(ungated, gates))
    return dict(METHOD.gate_gradients(ungated, statistics, gates.keys()))


def test_the_diagonals_of_values_and_neurons_leave_the_function_as_it_is(any_subject):
    turned = with_diagonals(any_subject, "values", "neurons")
    assert not torch.equal(turned.attention.value.weight, any_subject.attention.value.weight)
    expected = any_subject.run(any_subject.layer)
    torch.testing.assert_close(any_subject.run(turned), expected, rtol=1e-4, atol=1e-4)
    ones = {name: torch.ones(gates.shape) for name, gates in random_gates(any_subject).items()}
    ungated = METHOD.gated(turned, {name: ones[name] for name in ("values", "neurons")})
    torch.testing.assert_close(any_subject.run(ungated), expected, rtol=1e-4, atol=1e-4)


def test_queries_and_keys_become_factors_that_take_no_more_than_they_did(any_subject):
    layer = with_diagonals(any_subject, "query", "key")
    for name in ("query", "key"):
        dense, factors = getattr(any_subject.attention, name), getattr(layer.attention, name)
        size = factors.left.numel() + factors.right.numel()
        assert dense.weight.numel() - sum(dense.weight.shape) < size <= dense.weight.numel()
        assert factors.bias is dense.bias
        torch.testing.assert_close(factors.left.mT @ factors.left, torch.eye(factors.rank), rtol=0, atol=1e-5)


def test_closed_gates_are_as_if_their_units_had_gone(any_subject):
    turned = with_diagonals(any_subject, "query", "key", "values", "neurons")
    gates = {name: torch.ones(each.shape) for name, each in random_gates(any_subject).items()}
    groups = any_subject.attention.kv_heads
    kept = torch.stack([torch.arange(8)[torch.arange(8) != group % 8] for group in range(groups)])
    gates["values"] = torch.zeros(groups, 8).scatter(1, kept, 1.0)
    gates["neurons"][[3, 17]] = 0
    gates["query"][[0, 4]] = 0
    attention = keep_values(turned.attention, kept)
    rest = torch.tensor([place for place in range(len(gates["query"])) if place not in (0, 4)])
    query = attention.query
    attention = replace(attention, query=replace(query, left=query.left[:, rest], right=query.right[rest]))
    ffn = keep_neurons(turned.ffn, gates["neurons"].nonzero().flatten())
    expected = any_subject.run(replace(turned, attention=attention, ffn=ffn))
    torch.testing.assert_close(any_subject.run(METHOD.gated(turned, gates)), expected, rtol=1e-4, atol=1e-4)


def test_rotated_values_come_by_falling_worth_to_the_output(any_subject):
    """Without the first of them the output of attention changes most, and without the last least."""
    turned = with_diagonals(any_subject, "values")
    dense, groups = any_subject.run(any_subject.layer), any_subject.attention.kv_heads

    def error(value: int) -> float:
        gates = torch.ones(groups, 8)
        gates[:, value] = 0
        return (any_subject.run(METHOD.gated(turned, {"values": gates})) - dense).norm().item()

    assert error(0) > error(3) > error(7)


def check_gradients(subject, gates: dict[str, Tensor], places: int = 3) -> None:
    """Against differences of the loss."""
    found = gradients(subject, gates)
    ungated = with_diagonals(subject, *gates)
    for name, gate in gates.items():
        flat = gate.flatten()
        for place in torch.linspace(0, len(flat) - 1, places).long().tolist():
            at = {}
            for steps in (-2, -1, 1, 2):
                moved = flat.double()
                moved[place] += 5e-3 * steps
                at[steps] = loss(subject, METHOD.gated(ungated, gates | {name: moved.view(gate.shape)}))
            slope = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * 5e-3)
            assert found[name].flatten()[place].item() == pytest.approx(slope, rel=5e-3, abs=1), (name, place)


def test_a_gates_gradient_is_the_slope_of_the_loss(any_subject):
    check_gradients(any_subject, random_gates(any_subject))


def test_it_is_without_a_gate_too(gateless):
    check_gradients(gateless, random_gates(gateless))


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_it_is_of_every_expert_and_of_what_is_shared(subject, model_type):
    this = subject(model_type, **MIXTURES[model_type])
    gates = random_gates(this)
    assert ("shared.neurons" in gates) == (model_type != "gpt_oss")
    for name in ("query", "key", "values"):  # these change which experts are chosen, where the loss has no slope
        gates.pop(name, None)
    check_gradients(this, gates, places=5)


@pytest.mark.parametrize("model_type", ["phi3", "qwen3", "gemma2"])
def test_it_is_where_a_family_joins_projections_or_has_norms_behind_them(subject, model_type):
    this = subject(model_type, biases=False)
    check_gradients(this, random_gates(this))


# ---------------------------------------------------------------- plans


def profiles_of(model, **log_alpha: list[float]) -> list[dict[str, Tensor]]:
    """Gates of one log α in each layer."""
    start = METHOD.even_profile(model.dense_shape(0))
    return [
        {
            name: torch.full_like(gate, log_alpha[name][index] if name in log_alpha else START)
            for name, gate in start.items()
        }
        for index in range(model.num_layers)
    ]


def log_alpha_of(probability: float) -> float:
    """Of gates that are open so often."""
    return math.log(probability / (1 - probability)) - math.log(11)


ALL_OPEN = 20.0


def test_a_layer_keeps_what_its_gates_expect_to_stay_open():
    model = tiny(num_hidden_layers=3, intermediate_size=200, hidden_size=64, num_attention_heads=4, head_dim=32)
    target = Target(model, 0.3)
    log_alpha = {"neurons": [-3.0, 0.0, 3.0], "values": [3.0, -4.0, -2.4], "query": [0.0, 3.0, -3.0]}
    plan = METHOD.plan(target, profiles_of(model, **log_alpha), align=4)
    widths, values = [shape.ffn.width for shape in plan], [shape.attention.value_dim for shape in plan]
    ranks = [shape.attention.query_rank or 64 for shape in plan]
    assert widths[0] < widths[1] < widths[2] and values[1] < values[2] < values[0] and ranks[2] < ranks[0] < ranks[1]
    step = 3 * 4 * model.hidden_size
    assert abs(target.amount(plan) - target.remaining) <= step / 2


def test_where_the_gates_have_met_the_target_the_plan_is_what_they_say():
    """Of a query projection 64 wide and 128 high, factors break even at the rank 42."""
    model = tiny(num_hidden_layers=2, intermediate_size=200, hidden_size=64, num_attention_heads=4, head_dim=32)
    neurons, ranks = [0.5, 0.9], [0.5, None]
    whole = [ALL_OPEN, ALL_OPEN]
    log_alpha = {"neurons": [*map(log_alpha_of, neurons)], "query": [log_alpha_of(0.5), ALL_OPEN], "key": whole}
    gone = 3 * 64 * 200 * sum(1 - share for share in neurons) + (64 + 128) * 21
    target = Target(model, gone / Target(model, 0).dense)
    plan = METHOD.plan(target, profiles_of(model, **log_alpha, values=whole), align=1)
    dense = model.dense_shape(0).attention
    assert [shape.ffn.width for shape in plan] == pytest.approx([100, 180], abs=3)
    assert plan[0].attention == replace(dense, query_rank=plan[0].attention.query_rank)
    assert plan[0].attention.query_rank == pytest.approx(21, abs=1) and ranks[1] is None
    assert plan[1].attention.value_dim == dense.value_dim


def test_gates_take_what_their_units_take():
    model = tiny(num_hidden_layers=1, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    width = model.dense_shape(0).ffn.width
    assert METHOD.gate_amounts(Target(model, 0.3), 0) == {
        "query": (64 * 32 // (64 + 32)) * (64 + 32),
        "key": (64 * 16 // (64 + 16)) * (64 + 16),
        "values": 8 * (2 + 4) * 64,
        "neurons": width * 3 * 64,
    }
    assert set(METHOD.gate_amounts(Target(model, 0.3, layout="heterogeneous"), 0)) == {"neurons"}


def test_a_target_below_what_no_gate_is_in_front_of_is_refused():
    with pytest.raises(InputError, match=r"sparsity 0\.95 can't be reached"):
        METHOD.check_target(Target(tiny(), 0.95), 8)


# ---------------------------------------------------------------- pruned layers


def test_the_units_of_the_most_open_gates_stay(any_subject):
    shape = any_subject.layer.shape
    profile = {**any_subject.profile(METHOD), **random_gates(any_subject, seed=5)}
    planned = shape.with_attention(value_dim=5, query_rank=6).with_ffn(width=24)
    best = lambda gates, keep: gates.argsort(dim=-1)[..., gates.shape[-1] - keep :].sort(dim=-1).values  # noqa: E731
    turned = METHOD.with_diagonals(any_subject.layer, profile, ("values", "query"))
    attention, ranks = keep_values(turned.attention, best(profile["values"], 5)), best(profile["query"], 6)
    query = attention.query
    attention = replace(attention, query=replace(query, left=query.left[:, ranks], right=query.right[ranks]))
    ffn = keep_neurons(any_subject.ffn, best(profile["neurons"], 24))
    expected = any_subject.run_with(attention=attention, ffn=ffn)
    torch.testing.assert_close(any_subject.run(any_subject.prune(METHOD, planned, profile)), expected)


def test_attention_that_stays_as_it_is_is_neither_rotated_nor_factored(any_subject):
    planned = any_subject.layer.shape.with_ffn(width=24)
    assert any_subject.prune(METHOD, planned).attention is any_subject.attention


def test_a_profile_is_known_to_take_what_its_factors_take(any_subject):
    shape, profile = any_subject.layer.shape, any_subject.profile(METHOD)
    size = sum(profile[name].nbytes for name in ("query.left", "key.left"))
    assert METHOD.profile_bytes(any_subject.model.hidden_size, shape) == size


def test_no_moments_are_asked_for_when_a_layer_is_pruned(any_subject):
    shape = any_subject.layer.shape
    assert METHOD.pruning_moments(shape, shape) == ()
