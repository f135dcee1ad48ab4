"""What remains under a target, and what may go in each layout."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_architectures import BIASES, tiny

from distprune.budgets import Target, decoder_parameters, outer_parameters
from distprune.layers.shapes import Removable

FLAGS = {"plain": {}, "tied": {"tie_word_embeddings": True}, "all biases": BIASES}


@pytest.mark.parametrize("flags", FLAGS)
def test_what_remains_of_a_model_is_its_decoder_less_the_asked_for_fraction(flags):
    model = tiny(**FLAGS[flags])
    target = Target(model, 0.3)
    decoder = decoder_parameters(model, target.dense_shapes)
    whole = decoder + outer_parameters(model)
    assert target.dense == decoder
    assert target.remaining == decoder - round(0.3 * decoder)
    assert target.decoder_sparsity == 0.3

    counted = Target(model, 0.3, count_embeddings=True)
    assert counted.dense == decoder
    assert counted.remaining == decoder - round(0.3 * whole)
    assert counted.decoder_sparsity == pytest.approx(0.3 * whole / decoder)
    assert counted.remaining < target.remaining


@settings(deadline=None, max_examples=30)
@given(sparsity=st.floats(0, 0.99), layers=st.integers(1, 2), width=st.integers(1, 200))
def test_the_sparsity_of_decoder_layers_alone_is_not_rounded(sparsity, layers, width):
    """Methods branch on it: at 0.4 exactly, a last digit more is another budget."""
    model = tiny(num_hidden_layers=layers, intermediate_size=width)
    assert Target(model, sparsity).decoder_sparsity == sparsity


def test_a_sparsity_of_zero_leaves_everything():
    for count_embeddings in (False, True):
        target = Target(tiny(), 0.0, count_embeddings)
        assert target.remaining == target.dense
        assert target.decoder_sparsity == 0


@pytest.mark.parametrize("layout", ["heterogeneous", "stock"])
def test_whole_heads_and_neurons_alone_may_go_where_the_layout_says_nothing_else(layout):
    assert Target(tiny(), 0.1, layout=layout).removable(0) == Removable(heads=True, neurons=True)
    assert Target(tiny("gpt_neox"), 0.1, layout=layout).removable(0) == Removable(neurons=True)


def test_nothing_may_go_of_a_part_that_is_not_there():
    target = Target(tiny("deepseek_v3"), 0.1)
    assert target.removable(0) == Removable(neurons=True, branch=True, ffn=True)
    assert target.removable(2) == Removable(neurons=True, experts=True, ffn=True)
    everything = Removable(*[True] * 9)
    assert Target(tiny(), 0.1).removable(0) == replace(everything, experts=False)
