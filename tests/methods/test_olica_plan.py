"""Olica's budget: what is taken from which module, and which FFNs are calibrated."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_architectures import tiny

from distprune.budgets import Target, decoder_parameters, ffn_amount, layer_parameters
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.methods.olica import Olica, kept_rank


def llama(layers: int = 8, **changes) -> Architecture:
    sizes = {"hidden_size": 64, "intermediate_size": 192, "head_dim": 16, "vocab_size": 32}
    return tiny(**sizes | changes, num_hidden_layers=layers)


def profiles(linearity: list[float]) -> list[dict[str, torch.Tensor]]:
    return [{"ffn_linearity": torch.tensor(value)} for value in linearity]


RISING = [0.1 * index for index in range(8)]


@pytest.mark.parametrize(
    ("sparsity", "value_output", "query_key"),
    [(0.2, 0.1, 0.4), (0.3, 0.15, 0.6), (0.4, 0.2, 0.8), (0.45, 0.225, 0.675), (0.5, 0.25, 0.75)],
)
def test_attention_sparsities_are_the_published_ones(sparsity, value_output, query_key):
    assert Olica().attention_sparsities(sparsity) == pytest.approx((value_output, query_key))


def test_attention_sparsities_follow_the_ratio_k():
    assert Olica(k=1).attention_sparsities(0.3) == pytest.approx((0.3, 0.6))
    assert Olica(k=1).attention_sparsities(0.5) == pytest.approx((0.5, 0.5))


@given(out=st.integers(1, 300), inp=st.integers(1, 300), sparsity=st.floats(0, 0.99))
def test_kept_rank_holds_the_asked_for_share_of_the_parameters(out, inp, sparsity):
    rank = kept_rank(out, inp, sparsity, align=1)
    assert rank == max(1, ceil((1 - sparsity) * out * inp / (out + inp)))
    # The next smaller rank would hold too few.
    assert rank * (out + inp) >= (1 - sparsity) * out * inp * (1 - 1e-9)
    assert rank == 1 or (rank - 1) * (out + inp) < (1 - sparsity) * out * inp * (1 + 1e-9)


@given(out=st.integers(1, 40), inp=st.integers(1, 40), sparsity=st.floats(0, 0.99), align=st.sampled_from([1, 4, 8]))
def test_kept_rank_is_a_multiple_of_the_alignment_or_full(out, inp, sparsity, align):
    rank, full = kept_rank(8 * out, 8 * inp, sparsity, align), 8 * min(out, inp)
    assert 0 < rank <= full and rank % align == 0
    exact = (1 - sparsity) * 8 * out * inp / (out + inp)
    assert abs(rank - exact) <= align / 2 + 1 or rank == align


@pytest.mark.parametrize("sparsity", [0.1, 0.2, 0.3, 0.4, 0.5])
@pytest.mark.parametrize("align", [1, 4, 8])
def test_the_plan_meets_its_target_within_one_alignment_step(sparsity, align):
    model = llama()
    target = Target(model, sparsity)
    planned = Olica().plan(target, profiles(RISING), align)
    step = 3 * align * model.hidden_size
    assert abs(decoder_parameters(model, planned) - target.remaining) <= step / 2


def test_the_plan_holds_the_published_shares():
    planned = Olica().plan(Target(llama(head_dim=20), 0.4), profiles(RISING), align=1)
    assert {shape.attention.value_dim for shape in planned} == {16}  # 0.8 · 20
    assert {shape.attention.query_rank for shape in planned} == {8}  # ⌈0.2 · 80 · 64 / (80 + 64)⌉
    assert {shape.attention.key_rank for shape in planned} == {5}  # ⌈0.2 · 40 · 64 / (40 + 64)⌉
    assert {shape.ffn.branch_rank for shape in planned} == {2, None}  # 0.03 · 64


def test_forty_percent_is_on_the_published_side_of_the_kink_for_any_model():
    """A count of parameters rounded up must not turn 0.8 of queries and keys to 0.6."""
    for width in range(100, 140):
        model = llama(layers=1, intermediate_size=width)
        planned = Olica(calibrated_layers=0).plan(Target(model, 0.4), profiles([0.0]), align=1)
        assert planned[0].attention.query_rank == ceil(0.2 * 64 * 64 / 128), width


def test_count_embeddings_takes_more_from_every_module():
    model = llama(vocab_size=2000)
    plain, counted = (
        Olica().plan(Target(model, 0.2, count_embeddings=count), profiles(RISING), align=1)[-1]
        for count in (False, True)
    )
    for name in ("value_dim", "query_rank", "key_rank"):
        assert getattr(counted.attention, name) < getattr(plain.attention, name)
    assert counted.ffn.width < plain.ffn.width


def calibrated(method: Olica, linearity: list[float]) -> list[int]:
    model = llama(layers=len(linearity))
    planned = method.plan(Target(model, 0.2), profiles(linearity), align=1)
    return [index for index, shape in enumerate(planned) if shape.ffn.branch_rank]


def test_the_ffns_that_a_linear_map_explains_best_are_calibrated():
    assert calibrated(Olica(calibrated_layers=3), [0.3, 0.9, 0.1, 0.8, 0.2, 0.7, 0.4, 0.0]) == [1, 3, 5]


def test_the_last_layer_is_never_calibrated():
    assert calibrated(Olica(calibrated_layers=3), RISING) == [4, 5, 6]
    assert calibrated(Olica(calibrated_layers=99), RISING) == [0, 1, 2, 3, 4, 5, 6]


def test_without_calibrated_layers_there_is_no_branch_and_no_need_of_linearity():
    model, method = llama(), Olica(calibrated_layers=0)
    planned = method.plan(Target(model, 0.2), [{}] * 8, align=1)
    assert {shape.ffn.branch_rank for shape in planned} == {None}


def test_the_calibration_rank_is_a_fraction_of_the_hidden_size():
    method = Olica(calibration_rank_ratio=0.25)
    planned = method.plan(Target(llama(), 0.2), profiles(RISING), align=8)
    assert planned[0].ffn.branch_rank is None and planned[6].ffn.branch_rank == 16


def test_a_plan_of_sparsity_zero_is_the_dense_model():
    model = llama()
    dense = [model.dense_shape(index) for index in range(8)]
    assert Olica().plan(Target(model, 0.0), profiles(RISING), align=8) == dense


@pytest.mark.parametrize(
    ("sparsity", "options"),
    [
        (0.95, {}),  # k·s_vo is more than all queries and keys
        (0.6, {"k": 0}),  # s_vo is more than all values
        (0.9, {"k": 1}),  # attention can be taken, but what must stay of it leaves no FFN neuron
    ],
)
def test_a_target_out_of_reach_is_refused_before_anything_is_measured(sparsity, options):
    target, method = Target(llama(), sparsity), Olica(**options)
    with pytest.raises(InputError, match=f"sparsity {sparsity:g} can't be reached"):
        method.check_target(target, align=8)
    with pytest.raises(InputError, match=f"sparsity {sparsity:g} can't be reached"):
        method.plan(target, profiles(RISING), align=8)


def test_a_target_within_reach_is_not_refused():
    Olica().check_target(Target(llama(), 0.5), align=8)


def test_every_layer_of_one_plan_costs_about_the_same():
    """The budget is uniform: layers differ by one step of FFN neurons and the calibration branch at most."""
    model = llama()
    planned = Olica().plan(Target(model, 0.3), profiles(RISING), align=8)
    costs = [layer_parameters(model, index, shape) for index, shape in enumerate(planned)]
    assert max(costs) - min(costs) <= 3 * 8 * 64 + 2 * 8 * 64


def test_attention_that_can_not_become_smaller_stays_and_the_ffns_pay():
    """DeepSeek's attention is of a kind that is not known, and its last layer has experts."""
    model = tiny("deepseek_v3", num_hidden_layers=4, first_k_dense_replace=3)
    ffns = sum(ffn_amount("parameters", model, index, model.dense_shape(index).ffn) for index in range(4))
    target, method = Target(model, 0.4 * ffns / Target(model, 0).dense), Olica(calibrated_layers=2)
    linearity = profiles([0.3, 0.9, 0.5])
    method.check_target(target, 1)
    planned = method.plan(target, [*linearity, {}], align=1)
    assert all(shape.attention is None for shape in planned)
    experts = model.dense_shape(3).ffn
    assert planned[3].ffn == replace(experts, width=planned[3].ffn.width) and planned[3].ffn.width < experts.width
    assert [shape.ffn.branch_rank is not None for shape in planned[:3]] == [False, True, True]
    assert abs(decoder_parameters(model, planned) - target.remaining) <= (experts.count + 1) * 3 * 24 / 2


def test_where_no_branch_can_stand_there_is_none():
    model = tiny("opt")
    assert not model.removable(0).branch
    planned = Olica().plan(Target(model, 0.2), profiles([0.3, 0.9, 0.5]), align=1)
    assert {shape.ffn.branch_rank for shape in planned} == {None}
