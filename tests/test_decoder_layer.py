"""Decoder layers as values: to and from the state of the module that runs them."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import cycle

import numpy as np
import pytest
import torch
from distprune.decoder_layer import (
    DecoderLayer,
    LayerShape,
    Linear,
    LowRank,
    layer_from_state,
    slice_linear,
    state_of,
    stored_like,
)

from distprune.modeling import ROTARY_PAIRS, PrunedConfig, PrunedDecoderLayer

SHAPES = {
    "dense": LayerShape(4, 2, 8, 8, ffn_width=20),
    "narrow": LayerShape(3, 1, 8, 5, ffn_width=7),
    "low-rank": LayerShape(4, 2, 8, 6, ffn_width=20, query_rank=9, key_rank=4),
    "low-rank keys": LayerShape(4, 2, 8, 8, ffn_width=20, key_rank=4),
    "calibrated": LayerShape(4, 2, 8, 8, ffn_width=12, query_rank=9, key_rank=4, calibration_rank=3),
    "output bias": LayerShape(4, 2, 8, 8, ffn_width=20, output_bias=True),
    "down bias": LayerShape(4, 2, 8, 8, ffn_width=20, down_bias=True),
    "fewer rotary pairs": LayerShape(4, 2, 4, 8, ffn_width=20),
    "fewer rotary pairs, low-rank": LayerShape(4, 2, 2, 6, ffn_width=20, query_rank=9, key_rank=4),
    "no attention": LayerShape(0, 0, 0, 0, ffn_width=20, calibration_rank=3),
    "no FFN": LayerShape(4, 2, 8, 8, ffn_width=0, output_bias=True),
    "nothing": LayerShape(0, 0, 0, 0, ffn_width=0),
}
FLAGS = {
    "plain": {},
    "biases": {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
    "query and key norms": {"query_key_norm": True},
}


@pytest.fixture(params=SHAPES)
def asked_shape(request) -> LayerShape:
    return SHAPES[request.param]


@pytest.fixture(params=FLAGS)
def config(request, asked_shape) -> PrunedConfig:
    flags = FLAGS[request.param]
    if flags.get("query_key_norm") and 0 < asked_shape.query_key_dim < 8:
        pytest.skip("no such layer")
    return PrunedConfig(
        hidden_size=24,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_shapes=[asdict(asked_shape), asdict(SHAPES["dense"])],
        **flags,
    )


@pytest.fixture
def shape(config) -> LayerShape:
    """With the biases that the model gives to all layers."""
    return config.layer_shape(0)


@pytest.fixture
def module(config) -> PrunedDecoderLayer:
    return PrunedDecoderLayer(config, 0)


@pytest.fixture
def layer(module, shape) -> DecoderLayer:
    return layer_from_state(module.state_dict(), shape)


def test_a_layers_state_is_its_modules(layer, module):
    state, expected = state_of(layer), module.state_dict()
    assert state.keys() == expected.keys()
    assert all(state[name].data_ptr() == expected[name].data_ptr() for name in state)


def test_a_layer_made_from_its_own_state_is_the_same(layer):
    again = state_of(layer_from_state(state_of(layer), layer.shape))
    assert all(again[name] is tensor for name, tensor in state_of(layer).items())


def test_the_shape_follows_from_the_tensors(layer, shape):
    assert layer.shape == shape


def test_to_casts_every_tensor_and_nothing_else(layer, shape):
    cast = layer.to(torch.bfloat16)
    assert state_of(cast).keys() == state_of(layer).keys()
    assert cast.shape == shape
    for name, tensor in state_of(layer).items():
        expected = tensor if name == ROTARY_PAIRS else tensor.bfloat16()
        assert state_of(cast)[name].dtype == expected.dtype
        assert torch.equal(state_of(cast)[name], expected)


def test_to_moves_every_tensor(layer):
    moved = layer.to("meta", torch.float16)
    for name, tensor in state_of(moved).items():
        assert tensor.device.type == "meta"
        assert tensor.dtype == (torch.int64 if name == ROTARY_PAIRS else torch.float16)


def test_a_copy_shares_no_tensor_with_the_layer(layer):
    copies = state_of(layer.to(torch.float32, copy=True))
    assert all(copies[name].data_ptr() != tensor.data_ptr() for name, tensor in state_of(layer).items())


def test_a_layer_in_anothers_dtypes_has_that_of_the_tensor_that_each_was_made_from():
    """Factors have the replaced matrix's, an added bias its matrix's, and the branch that of the FFN's output."""
    shape = SHAPES["dense"]
    config = PrunedConfig(hidden_size=24, num_attention_heads=4, head_dim=8, num_hidden_layers=1)
    state = PrunedDecoderLayer(config, 0, shape).state_dict()
    dtypes = dict(zip(state, cycle([torch.float64, torch.float16, torch.bfloat16, torch.float32]), strict=False))
    stored = layer_from_state({name: tensor.to(dtypes[name]) for name, tensor in state.items()}, shape)
    dense = layer_from_state(state, shape)
    made = replace(
        dense,
        query=LowRank(torch.ones(3, 24), torch.ones(32, 3)),
        output=Linear(dense.output.weight, torch.ones(24)),
        calibration=LowRank(torch.ones(2, 24), torch.ones(24, 2)),
    )
    new = {
        "self_attn.right.q_proj.weight": "self_attn.q_proj.weight",
        "self_attn.left.q_proj.weight": "self_attn.q_proj.weight",
        "self_attn.o_proj.bias": "self_attn.o_proj.weight",
        "mlp.right.calibration.weight": "mlp.down_proj.weight",
        "mlp.left.calibration.weight": "mlp.down_proj.weight",
    }
    found = {name: tensor.dtype for name, tensor in state_of(stored_like(made, stored)).items()}
    assert found == {name: dtypes[new.get(name, name)] for name in state_of(made)}
    again = {name: tensor.dtype for name, tensor in state_of(stored_like(made, stored_like(made, stored))).items()}
    assert again == found


def test_casting_leaves_the_layer_as_it_was(layer):
    layer.to(torch.bfloat16)
    assert {tensor.dtype for name, tensor in state_of(layer).items() if name != ROTARY_PAIRS} <= {torch.float32}


@pytest.fixture
def linear() -> Linear:
    return Linear(torch.arange(30.0).reshape(5, 6), torch.arange(5.0))


ROWS, COLUMNS = [3, 0], [5, 1, 2]


@pytest.mark.parametrize("rows", [None, ROWS])
@pytest.mark.parametrize("columns", [None, COLUMNS])
def test_slicing_keeps_rows_with_their_biases_and_columns(linear, rows, columns):
    chosen = {name: torch.tensor(index) for name, index in {"rows": rows, "columns": columns}.items() if index}
    sliced = slice_linear(linear, **chosen)
    weight, bias = linear.weight.numpy(), linear.bias.numpy()
    expected_rows, expected_columns = rows or range(5), columns or range(6)
    np.testing.assert_array_equal(sliced.weight.numpy(), weight[np.ix_(expected_rows, expected_columns)])
    np.testing.assert_array_equal(sliced.bias.numpy(), bias[list(expected_rows)])
    assert sliced.weight.is_contiguous()


def test_slicing_without_a_bias_gives_none(linear):
    assert slice_linear(Linear(linear.weight), rows=torch.tensor(ROWS)).bias is None
