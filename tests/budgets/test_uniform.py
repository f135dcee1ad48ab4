"""Filling a parameter budget with FFN neurons."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distprune.budgets import Target, aligned, decoder_parameters, fill_with_ffn
from distprune.errors import InputError
from distprune.modeling import LayerShape, PrunedConfig

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


def attention_shapes() -> st.SearchStrategy[LayerShape]:
    """Attention pruned in any way, and an FFN width that is to be replaced."""
    ranks = st.none() | st.integers(1, 18)
    return st.builds(
        partial(LayerShape, query_heads=4, kv_heads=2, query_key_dim=8, ffn_width=FULL),
        value_dim=st.integers(1, 8),
        query_rank=ranks,
        key_rank=ranks,
        calibration_rank=st.none() | st.integers(1, 4),
    )


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    layers=st.integers(1, 6),
    align=st.sampled_from([1, 2, 3, 8, 16, 32]),
    sparsity=st.floats(0, 0.9),
    biases=st.booleans(),
)
def test_the_whole_decoder_is_within_half_a_step_of_the_target(tiny_config, data, layers, align, sparsity, biases):
    config: PrunedConfig = tiny_config(num_hidden_layers=layers, intermediate_size=FULL, mlp_bias=biases)
    shapes = data.draw(st.lists(attention_shapes(), min_size=layers, max_size=layers))
    target = Target(config, sparsity)

    def with_ffn(width: int) -> int:
        return decoder_parameters(config, [replace(shape, ffn_width=width) for shape in shapes])

    assume(with_ffn(align) <= target.remaining <= with_ffn(FULL))
    filled = fill_with_ffn(target, shapes, align)

    step = align * (3 * HIDDEN + 2 * biases)
    assert abs(decoder_parameters(config, filled) - target.remaining) <= step / 2
    widths = [shape.ffn_width for shape in filled]
    assert all(width % align == 0 and align <= width <= FULL for width in widths)
    assert max(widths) - min(widths) <= align
    assert [replace(shape, ffn_width=FULL) for shape in filled] == shapes


@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 6), sparsity=st.floats(0.05, 0.5))
def test_embeddings_that_count_are_paid_for_by_the_decoder(tiny_config, layers, sparsity):
    config = tiny_config(num_hidden_layers=layers, vocab_size=20)
    shapes = [config.dense_shape()] * layers
    target = Target(config, sparsity, count_embeddings=True)
    whole = target.dense + 2 * 20 * HIDDEN + HIDDEN
    filled = fill_with_ffn(target, shapes, align=4)
    removed = target.dense - decoder_parameters(config, filled)
    assert abs(removed - sparsity * whole) <= 4 * 3 * HIDDEN / 2 + 1


def test_no_ffn_becomes_wider_than_the_dense_one(tiny_config):
    """Attention alone has lost more than was asked for."""
    config = tiny_config(intermediate_size=100)
    narrow = replace(config.dense_shape(), value_dim=1)
    filled = fill_with_ffn(Target(config, 0.01), [narrow] * 3, align=8)
    assert filled == [narrow] * 3


def test_a_target_below_one_step_a_layer_is_refused(tiny_config):
    config = tiny_config()
    shapes = [config.dense_shape()] * 3

    def target(width: int) -> Target:
        """The decoder with FFNs of that width."""
        remaining = decoder_parameters(config, [replace(shape, ffn_width=width) for shape in shapes])
        return Target(config, 1 - remaining / decoder_parameters(config, shapes))

    assert [shape.ffn_width for shape in fill_with_ffn(target(8), shapes, align=8)] == [8, 8, 8]
    with pytest.raises(InputError, match=r"can't be reached.*lower --sparsity"):
        fill_with_ffn(target(5), shapes, align=8)
    with pytest.raises(InputError, match=r"sparsity 0\.99 "):
        fill_with_ffn(Target(config, 0.99), shapes, align=8)


@settings(max_examples=25, deadline=None)
@given(layers=st.integers(1, 6), align=st.sampled_from([1, 8, 16]), sparsity=st.floats(0, 0.6))
def test_a_stock_layout_has_one_width_and_meets_the_target_within_half_a_step_a_layer(
    tiny_config, layers, align, sparsity
):
    config = tiny_config(num_hidden_layers=layers, intermediate_size=FULL)
    target = Target(config, sparsity, stock=True)
    wanted = [float(index + 1) for index in range(layers)]
    filled = fill_with_ffn(target, [config.dense_shape()] * layers, align, wanted)
    assert len(set(filled)) == 1 and filled[0].ffn_width % align == 0
    assert abs(decoder_parameters(config, filled) - target.remaining) <= layers * align * 3 * HIDDEN / 2
