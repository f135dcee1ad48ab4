"""A layer pruned by Olica has the shape that was planned, whatever was planned."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.layers.parts import map_tensors
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape
from distprune.methods.olica import Olica

HIDDEN, WIDTH, HEAD = 24, 40, 8
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (6, 3)])


@st.composite
def plans(draw, biases: bool) -> LayerShape:
    query_heads, kv_heads = draw(HEADS)
    attention = AttentionShape(
        query_heads,
        kv_heads,
        HEAD,
        value_dim=draw(st.integers(1, HEAD)),
        query_rank=draw(st.integers(1, min(HIDDEN, HEAD * query_heads))),
        key_rank=draw(st.integers(1, min(HIDDEN, HEAD * kv_heads))),
        output_bias=biases,
    )
    width, rank = draw(st.integers(1, WIDTH)), draw(st.none() | st.integers(1, HIDDEN))
    return LayerShape(attention, FeedForwardShape(width, rank, down_bias=biases))


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    biases=st.booleans(),
    decomposition=st.sampled_from(["values", "weights", "none"]),
    keep_least=st.sampled_from([0, 0.01, 0.5]),
)
def test_a_pruned_layer_has_exactly_the_planned_tensors(subject, data, biases, decomposition, keep_least):
    planned = data.draw(plans(biases))
    heads = {"query_heads": planned.attention.query_heads, "kv_heads": planned.attention.kv_heads}
    dense = subject(**heads, biases=biases)
    pruned = dense.prune(Olica(decomposition=decomposition, keep_least=keep_least), planned)
    tensors = dense.model.names(0).state_of(pruned)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == dense.model.layer_tensors(0, planned)
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert dense.run(pruned).isfinite().all()


def test_a_layer_planned_as_it_is_stays_as_it_is(subject):
    dense = subject()
    pruned = dense.prune(Olica(), dense.layer.shape)
    assert pruned.attention is dense.attention and pruned.ffn is dense.ffn


def test_a_silent_layer_is_pruned_without_dividing_by_zero(subject):
    """Calibration text on which attention and FFN read nothing but zeros."""
    dense, method = subject(biases=False), Olica()
    silent = replace(dense, layer=replace(dense.layer, rest=map_tensors(dense.layer.rest, torch.zeros_like)))
    planned = silent.layer.shape.with_attention(value_dim=5, query_rank=9, key_rank=4)
    pruned = silent.prune(method, planned.with_ffn(width=22, branch_rank=3))
    assert all(tensor.isfinite().all() for tensor in dense.model.names(0).state_of(pruned).values())
    assert silent.profile(method)["ffn_linearity"] == 0
