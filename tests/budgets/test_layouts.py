"""Which layouts can describe pruned layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_architectures import BIASES, tiny

from distprune.budgets import has_plain_heads, is_heterogeneous, is_stock, layout_of
from distprune.layers.shapes import LayerShape


def test_layers_that_lost_whole_heads_and_neurons_alike_are_stock():
    model = tiny()
    dense = model.dense_shape(0)
    smaller = dense.with_attention(query_heads=2, kv_heads=1).with_ffn(width=16)
    assert is_stock(model, [dense] * 3) and is_stock(model, [smaller] * 3)
    assert layout_of(model, [smaller] * 3) == "stock"


def test_layers_that_lost_whole_heads_and_neurons_each_by_itself_are_heterogeneous():
    model = tiny()
    dense = model.dense_shape(0)
    fewer_heads = dense.with_attention(query_heads=2)
    fewer_groups = dense.with_attention(query_heads=2, kv_heads=1).with_ffn(width=16)
    shapes = [dense, fewer_heads, fewer_groups]
    assert is_heterogeneous(model, shapes) and not is_stock(model, shapes)
    assert layout_of(model, shapes) == "heterogeneous"


@pytest.mark.parametrize(
    "changed",
    [
        lambda dense: dense.with_attention(value_dim=4),
        lambda dense: dense.with_attention(query_key_dim=4),
        lambda dense: dense.with_attention(query_rank=3),
        lambda dense: dense.with_attention(output_bias=True),
        lambda dense: dense.with_ffn(branch_rank=2),
        lambda dense: dense.with_ffn(down_bias=True),
        lambda dense: replace(dense, attention=None),
        lambda dense: replace(dense, ffn=None),
    ],
)
def test_everything_else_is_free(changed):
    model = tiny()
    shapes = [changed(model.dense_shape(0))] * 3
    assert not is_heterogeneous(model, shapes) and not is_stock(model, shapes)
    assert layout_of(model, shapes) == "free"


def test_biases_that_the_family_has_are_no_change():
    model = tiny(**BIASES)
    shapes = [model.dense_shape(0).with_ffn(width=8)] * 3
    assert shapes[0].ffn.down_bias and is_stock(model, shapes)


def test_parts_that_the_dense_layers_lack_are_no_change():
    """DeepSeek's attention is of a kind that is not known, and so is what its last layer has for an FFN."""
    model = tiny("deepseek_v3")
    dense = [model.dense_shape(index) for index in range(3)]
    assert [bool(shape.ffn) for shape in dense] == [True, True, False] and dense[0].attention is None
    alike = [shape.with_ffn(width=24) if shape.ffn else shape for shape in dense]
    assert is_stock(model, dense) and is_stock(model, alike)
    assert layout_of(model, [alike[0], dense[1], dense[2]]) == "heterogeneous"
    assert layout_of(model, [LayerShape(None, None), *dense[1:]]) == "free"


def test_heads_divide_the_hidden_size_or_are_all_there():
    model = tiny(hidden_size=40, num_attention_heads=10, num_key_value_heads=10)
    counts = (10, 9, 8, 7, 5)
    shapes = [model.dense_shape(0).with_attention(query_heads=count, kv_heads=count) for count in counts]
    assert [has_plain_heads(model, shape) for shape in shapes] == [True, False, True, False, True]
    assert has_plain_heads(model, replace(shapes[1], attention=None))
    assert not is_stock(model, [shapes[1]] * 3) and is_heterogeneous(model, [shapes[1]] * 3)
