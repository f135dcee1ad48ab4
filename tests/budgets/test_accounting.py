"""Parameter counts, against the numbers of elements of real models."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprune.budgets import Target, decoder_parameters, layer_parameters, outer_parameters
from distprune.modeling import LayerShape, PrunedForCausalLM

SHAPES = [
    LayerShape(4, 2, 8, 5, ffn_width=40, query_rank=9, key_rank=4, calibration_rank=3),
    LayerShape(3, 1, 8, 8, ffn_width=7, query_rank=5),
    LayerShape(4, 2, 8, 8, ffn_width=96),
]
REDUCED = [
    LayerShape(4, 2, 4, 5, ffn_width=40, query_rank=9),
    LayerShape(4, 2, 2, 8, ffn_width=0),
    LayerShape(0, 0, 0, 0, ffn_width=7, calibration_rank=3),
    LayerShape(0, 0, 0, 0, ffn_width=0),
]
FLAGS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "attention biases": {"attention_bias": True},
    "all biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "query and key norms": {"query_key_norm": True},
}


def elements(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("flags", FLAGS)
def test_counts_are_those_of_a_model_with_these_shapes(tiny_config, flags):
    dense = tiny_config(**FLAGS[flags])
    model = PrunedForCausalLM(tiny_config(**FLAGS[flags], layer_shapes=[asdict(shape) for shape in SHAPES]))
    for index, layer in enumerate(model.model.layers):
        assert layer_parameters(dense, index, SHAPES[index]) == elements(layer)
    assert decoder_parameters(dense, SHAPES) == elements(model.model.layers)
    assert outer_parameters(dense) == elements(model) - elements(model.model.layers)


@pytest.mark.parametrize("flags", ["plain", "tied", "attention biases", "all biases"])
def test_what_a_layer_lacks_and_which_pairs_it_kept_are_no_parameters(tiny_config, flags):
    dense = tiny_config(**FLAGS[flags], num_hidden_layers=4)
    shapes = [asdict(shape) for shape in REDUCED]
    model = PrunedForCausalLM(tiny_config(**FLAGS[flags], num_hidden_layers=4, layer_shapes=shapes))
    counts = [layer_parameters(dense, index, shape) for index, shape in enumerate(REDUCED)]
    assert counts == [elements(layer) for layer in model.model.layers]
    assert counts[3] == 0
    assert decoder_parameters(dense, REDUCED) + outer_parameters(dense) == elements(model)


@pytest.mark.parametrize("flags", FLAGS)
def test_what_remains_of_a_model_is_its_decoder_less_the_asked_for_fraction(tiny_config, flags):
    config = tiny_config(**FLAGS[flags])
    model = PrunedForCausalLM(config)
    decoder, whole = elements(model.model.layers), elements(model)
    target = Target(config, 0.3)
    assert target.dense == decoder
    assert target.remaining == decoder - round(0.3 * decoder)
    assert target.decoder_sparsity == 0.3

    counted = Target(config, 0.3, count_embeddings=True)
    assert counted.dense == decoder
    assert counted.remaining == decoder - round(0.3 * whole)
    assert counted.decoder_sparsity == pytest.approx(0.3 * whole / decoder)
    assert counted.remaining < target.remaining


@given(sparsity=st.floats(0, 0.99), layers=st.integers(1, 2), width=st.integers(1, 200))
def test_the_sparsity_of_decoder_layers_alone_is_not_rounded(tiny_config, sparsity, layers, width):
    """Methods branch on it: at 0.4 exactly, a last digit more is another budget."""
    config = tiny_config(num_hidden_layers=layers, intermediate_size=width)
    assert Target(config, sparsity).decoder_sparsity == sparsity


def test_a_sparsity_of_zero_leaves_everything(tiny_config):
    for count_embeddings in (False, True):
        target = Target(tiny_config(), 0.0, count_embeddings)
        assert target.remaining == target.dense
        assert target.decoder_sparsity == 0
