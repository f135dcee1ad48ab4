"""Filling a parameter budget with FFN neurons."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_architectures import BIASES, tiny

from distprune.budgets import Target, aligned, decoder_parameters, fill_with_ffn, is_stock
from distprune.budgets.filling import share_out
from distprune.errors import InputError
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape

FULL, HIDDEN = 96, 24


@given(width=st.floats(0, 500), align=st.integers(1, 64), multiples=st.integers(1, 9))
def test_aligned_is_the_nearest_multiple_within_bounds(width, align, multiples):
    most = align * multiples
    rounded = aligned(width, align, most)
    assert rounded % align == 0 and align <= rounded <= most
    assert all(abs(rounded - width) <= abs(other - width) for other in range(align, most + 1, align))


def test_aligned_does_not_exceed_a_bound_that_is_no_multiple():
    assert aligned(99, 8, most=100) == 96
    assert aligned(103, 8, most=100) == 100
    assert aligned(5, 8, most=6) == 6


def layer_shapes() -> st.SearchStrategy[LayerShape]:
    """Attention pruned in any way, and an FFN width that is to be replaced."""
    ranks = st.none() | st.integers(1, 18)
    attention = st.builds(
        partial(AttentionShape, query_heads=4, kv_heads=2, query_key_dim=8),
        value_dim=st.integers(1, 8),
        query_rank=ranks,
        key_rank=ranks,
    )
    ffn = st.builds(FeedForwardShape, width=st.just(FULL), branch_rank=st.none() | st.integers(1, 4))
    return st.builds(LayerShape, st.none() | attention, ffn)


def with_width(shapes: list[LayerShape], width: int) -> list[LayerShape]:
    return [shape.with_ffn(width=width) for shape in shapes]


def as_biased(shape: LayerShape) -> LayerShape:
    """With the biases of a family that has them everywhere."""
    shape = shape.with_ffn(down_bias=True)
    return shape.with_attention(output_bias=True) if shape.attention else shape


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    layers=st.integers(1, 6),
    align=st.sampled_from([1, 2, 3, 8, 16, 32]),
    sparsity=st.floats(0, 0.9),
    biases=st.booleans(),
)
def test_the_whole_decoder_is_within_half_a_step_of_the_target(data, layers, align, sparsity, biases):
    model = tiny(num_hidden_layers=layers, **BIASES if biases else {})
    shapes = data.draw(st.lists(layer_shapes(), min_size=layers, max_size=layers))
    shapes = list(map(as_biased, shapes)) if biases else shapes
    target = Target(model, sparsity)
    least, most = (decoder_parameters(model, with_width(shapes, width)) for width in (align, FULL))
    assume(least <= target.remaining <= most)
    filled = fill_with_ffn(target, shapes, align)

    step = align * (3 * HIDDEN + 2 * biases)
    assert abs(decoder_parameters(model, filled) - target.remaining) <= step / 2
    widths = [shape.ffn.width for shape in filled]
    assert all(width % align == 0 and align <= width <= FULL for width in widths)
    assert max(widths) - min(widths) <= align
    assert with_width(filled, FULL) == shapes


@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 6), sparsity=st.floats(0.05, 0.5))
def test_embeddings_that_count_are_paid_for_by_the_decoder(layers, sparsity):
    model = tiny(num_hidden_layers=layers, vocab_size=20)
    target = Target(model, sparsity, count_embeddings=True)
    whole = target.dense + 2 * 20 * HIDDEN + HIDDEN
    filled = fill_with_ffn(target, target.dense_shapes, align=4)
    removed = target.dense - decoder_parameters(model, filled)
    assert abs(removed - sparsity * whole) <= 4 * 3 * HIDDEN / 2 + 1


def test_no_ffn_becomes_wider_than_the_dense_one():
    """Attention alone has lost more than was asked for."""
    model = tiny(intermediate_size=100)
    narrow = [model.dense_shape(0).with_attention(value_dim=1)] * 3
    assert fill_with_ffn(Target(model, 0.01), narrow, align=8) == narrow


def test_a_target_below_one_step_a_layer_is_refused():
    model = tiny()
    shapes = [model.dense_shape(0)] * 3

    def target(width: int) -> Target:
        """The decoder with FFNs of that width."""
        return Target(model, 1 - decoder_parameters(model, with_width(shapes, width)) / Target(model, 0).dense)

    assert [shape.ffn.width for shape in fill_with_ffn(target(8), shapes, align=8)] == [8, 8, 8]
    with pytest.raises(InputError, match=r"can't be reached: it leaves no FFN neurons.*lower --sparsity"):
        fill_with_ffn(target(5), shapes, align=8)
    with pytest.raises(InputError, match=r"sparsity 0\.99 "):
        fill_with_ffn(Target(model, 0.99), shapes, align=8)


@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 6), align=st.sampled_from([1, 8, 16]), sparsity=st.floats(0, 0.6))
def test_a_stock_layout_has_one_width_and_meets_the_target_within_half_a_step_a_layer(layers, align, sparsity):
    model = tiny(num_hidden_layers=layers)
    target = Target(model, sparsity, layout="stock")
    wanted = [float(index + 1) for index in range(layers)]
    filled = fill_with_ffn(target, target.dense_shapes, align, wanted)
    assert len(set(filled)) == 1 and filled[0].ffn.width % align == 0
    assert abs(decoder_parameters(model, filled) - target.remaining) <= layers * align * 3 * HIDDEN / 2


# ------------------------------------------------------------------ layers that differ


class Differing:
    """A model whose layers have FFNs of their own widths, some without a gate, and one with none that is known."""

    def __init__(self, base, ffns: list[FeedForwardShape | None], closed: tuple[int, ...] = ()):
        self._base, self._ffns, self._closed = base, ffns, closed

    def __getattr__(self, name):
        return getattr(self._base, name)

    @property
    def num_layers(self):
        return len(self._ffns)

    def dense_shape(self, index):
        return LayerShape(self._base.dense_shape(0).attention, self._ffns[index])

    def kind(self, index):
        return self._ffns[index]

    def removable(self, index):
        return replace(self._base.removable(0), neurons=index not in self._closed)

    def ffn_tensors(self, index, shape):
        return {f"{number}": (shape.width, HIDDEN) for number in range(3 if shape.is_gated else 2)}


def differing(closed: tuple[int, ...] = ()) -> Differing:
    ffns = [FeedForwardShape(96), FeedForwardShape(192), FeedForwardShape(64, is_gated=False), None]
    return Differing(tiny(num_hidden_layers=4), ffns, closed)


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.5])
def test_each_layer_keeps_as_much_of_its_own_width(align, sparsity):
    target = Target(differing(), sparsity)
    filled = fill_with_ffn(target, target.dense_shapes, align)
    assert abs(target.amount(filled) - target.remaining) <= 3 * align * HIDDEN / 2
    kept = [shape.ffn.width / dense.ffn.width for shape, dense in zip(filled[:3], target.dense_shapes, strict=False)]
    assert max(kept) - min(kept) <= 2 * align / 64
    assert filled[3] == target.dense_shapes[3] and filled[2].ffn.is_gated is False


def test_an_ffn_that_may_lose_nothing_stays_and_the_others_pay():
    target = Target(differing(closed=(1,)), 0.2)
    filled = fill_with_ffn(target, target.dense_shapes, align=1)
    assert filled[1] == target.dense_shapes[1]
    assert abs(target.amount(filled) - target.remaining) <= 3 * HIDDEN / 2


def test_where_no_neuron_may_go_what_else_goes_must_do():
    target = Target(differing(closed=(0, 1, 2)), 0.1)
    with pytest.raises(InputError, match="what else goes is too little, and no FFN neurons can go"):
        fill_with_ffn(target, target.dense_shapes, align=1)
    without = [replace(shape, attention=None) for shape in target.dense_shapes]
    assert fill_with_ffn(target, without, align=1) == without


def mixed():
    """DeepSeek with a first layer that has no experts, whose neurons take a ninth of what those of a mixture do."""
    latent = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
    layers = {"num_hidden_layers": 4, "n_routed_experts": 8, "first_k_dense_replace": 1}
    model = tiny("deepseek_v3", **layers, **latent, num_key_value_heads=4)
    assert [isinstance(shape.ffn, ExpertsShape) for shape in model.dense_shapes] == [False, True, True, True]
    return model


@pytest.mark.parametrize("align", [1, 4])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.4])
def test_beside_mixtures_each_layer_keeps_as_much_of_its_own_width(align, sparsity):
    target = Target(mixed(), sparsity)
    filled, dense = fill_with_ffn(target, target.dense_shapes, align), target.dense_shapes
    assert abs(target.amount(filled) - target.remaining) <= 9 * 3 * align * HIDDEN / 2
    assert all(now.ffn == replace(before.ffn, width=now.ffn.width) for now, before in zip(filled, dense, strict=True))
    kept = [now.ffn.width / before.ffn.width for now, before in zip(filled, dense, strict=True)]
    assert max(kept) - min(kept) <= 2 * align / dense[1].ffn.width
    assert all(shape.ffn.width % align == 0 for shape in filled)


@pytest.mark.parametrize("sparsity", [0.0, 0.05, 0.2, 0.4])
def test_a_stock_layout_has_one_width_for_experts_and_one_for_other_networks(sparsity):
    model = mixed()
    target = Target(model, sparsity, layout="stock")
    filled = fill_with_ffn(target, target.dense_shapes, 1)
    assert is_stock(model, filled) and len(set(filled[1:])) == 1
    kept = [shape.ffn.width / dense.ffn.width for shape, dense in zip(filled, target.dense_shapes, strict=True)]
    assert abs(kept[0] - kept[1]) <= 1 / 16
    assert abs(target.amount(filled) - target.remaining) <= 3 * 9 * 3 * HIDDEN / 2


def test_a_layer_without_experts_does_not_make_up_for_what_is_rounded_in_mixtures():
    """Where they alternate, a step of a mixture is worth many neurons of the others."""
    widths = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 16, "intermediate_size": 320}
    model = tiny("qwen2_moe", num_hidden_layers=8, num_experts=64, decoder_sparse_step=2, **widths)
    assert len({type(shape.ffn) for shape in model.dense_shapes}) == 2
    target = Target(model, 0.3)
    filled = fill_with_ffn(target, target.dense_shapes, 8)
    widths = [shape.ffn.width for shape in filled if not isinstance(shape.ffn, ExpertsShape)]
    assert max(widths) - min(widths) <= 8
    assert abs(target.amount(filled) - target.remaining) <= 64 * 3 * 8 * HIDDEN / 2


@given(
    data=st.data(), wanted=st.lists(st.floats(0.1, 10), min_size=1, max_size=8), share=st.floats(0, 1)
)  # fmt: skip
def test_shares_cost_the_total_within_half_the_dearest_one(data, wanted, share):
    count = len(wanted)
    most = data.draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))
    prices = [1.0, *data.draw(st.lists(st.floats(1, 3), min_size=count - 1, max_size=count - 1))]
    least, whole = sum(prices), sum(cap * price for cap, price in zip(most, prices, strict=True))
    total = least + share * (whole - least)
    shares = share_out(total, wanted, most, prices)
    assert all(1 <= mine <= cap for mine, cap in zip(shares, most, strict=True))
    spent = sum(mine * price for mine, price in zip(shares, prices, strict=True))
    assert abs(spent - total) <= max(prices) + 0.5
