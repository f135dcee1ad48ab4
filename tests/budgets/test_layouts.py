"""Which layouts can describe pruned layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tiny_architectures import BIASES, tiny

from distprune.budgets import has_plain_heads, is_heterogeneous, is_stock, layout_of
from distprune.budgets.layouts import has_lost_units_alone
from distprune.layers.shapes import ExpertsShape, LayerShape


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
    """DeepSeek's attention is of a kind that is not known."""
    model = tiny("deepseek_v3")
    dense = [model.dense_shape(index) for index in range(3)]
    assert dense[0].attention is None
    alike = [shape.with_ffn(width=24) for shape in dense]
    assert is_stock(model, dense) and is_stock(model, alike)
    assert layout_of(model, [alike[0], dense[1], dense[2]]) == "heterogeneous"
    assert layout_of(model, [LayerShape(None, None), *dense[1:]]) == "free"


def test_dense_layers_and_mixtures_are_alike_each_among_themselves():
    model = tiny("deepseek_v3", first_k_dense_replace=1)
    dense = [model.dense_shape(index) for index in range(3)]
    assert [isinstance(shape.ffn, ExpertsShape) for shape in dense] == [False, True, True]
    narrow = dense[0].with_ffn(width=24)
    mixture, fewer = dense[1].with_ffn(width=8, count=2), dense[1].with_ffn(width=8, count=3)
    assert layout_of(model, [narrow, mixture, mixture]) == "stock"
    assert layout_of(model, [dense[0], mixture, mixture]) == "stock"
    assert layout_of(model, [narrow, mixture, fewer]) == "heterogeneous"
    assert layout_of(model, [narrow, mixture, dense[2]]) == "heterogeneous"
    assert layout_of(model, [narrow, replace(mixture, ffn=None), mixture]) == "free"


def test_a_shared_network_has_a_width_of_its_own_where_the_family_says_it():
    sizes = {"num_experts": 4, "moe_intermediate_size": 16}
    model = tiny("qwen2_moe", shared_expert_intermediate_size=32, **sizes)
    dense = [model.dense_shape(index) for index in range(3)]
    narrow = [shape.with_ffn(shared_width=24) for shape in dense]
    assert layout_of(model, narrow) == "stock"
    assert layout_of(model, [narrow[0], *dense[1:]]) == "heterogeneous"
    plain = tiny("qwen3_moe", **sizes).dense_shape(0)
    assert not has_lost_units_alone(plain, plain.with_ffn(shared_width=24))


def test_heads_divide_the_hidden_size_or_are_all_there():
    model = tiny(hidden_size=40, num_attention_heads=10, num_key_value_heads=10)
    counts = (10, 9, 8, 7, 5)
    shapes = [model.dense_shape(0).with_attention(query_heads=count, kv_heads=count) for count in counts]
    assert [has_plain_heads(model, shape) for shape in shapes] == [True, False, True, False, True]
    assert has_plain_heads(model, replace(shapes[1], attention=None))
    assert not is_stock(model, [shapes[1]] * 3) and is_heterogeneous(model, [shapes[1]] * 3)


def test_mixtures_are_alike_among_themselves_and_so_are_other_networks():
    """DeepSeek's first layers have no experts; a plain configuration has a width for these, and one for experts."""
    model = tiny("deepseek_v3", num_hidden_layers=4)
    dense = [model.dense_shape(index) for index in range(4)]
    assert [isinstance(shape.ffn, ExpertsShape) for shape in dense] == [False, False, True, True]
    narrower = [shape.with_ffn(width=8) for shape in dense]
    fewer = [*dense[:2], dense[2].with_ffn(count=2), dense[3].with_ffn(count=2)]
    for shapes in (dense, narrower, fewer):
        assert layout_of(model, shapes) == "stock"
    for changes in ({"width": 8}, {"count": 2}):
        assert layout_of(model, [*dense[:3], dense[3].with_ffn(**changes)]) == "heterogeneous"
    assert layout_of(model, [*dense[:1], narrower[1], *dense[2:]]) == "heterogeneous"
