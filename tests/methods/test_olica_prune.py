"""A layer pruned by Olica has the shape that was planned, whatever was planned."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distprune.decoder_layer import LayerShape, state_of
from distprune.methods import Olica
from distprune.modeling import layer_tensor_shapes

HIDDEN, WIDTH, HEAD = 24, 40, 8
HEADS = st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1), (6, 3)])


@st.composite
def plans(draw) -> LayerShape:
    query_heads, kv_heads = draw(HEADS)
    return LayerShape(
        query_heads,
        kv_heads,
        HEAD,
        value_dim=draw(st.integers(1, HEAD)),
        ffn_width=draw(st.integers(1, WIDTH)),
        query_rank=draw(st.integers(1, min(HIDDEN, HEAD * query_heads))),
        key_rank=draw(st.integers(1, min(HIDDEN, HEAD * kv_heads))),
        calibration_rank=draw(st.none() | st.integers(1, HIDDEN)),
    )


@settings(max_examples=60, deadline=None)
@given(
    planned=plans(),
    biases=st.booleans(),
    decomposition=st.sampled_from(["values", "weights", "none"]),
    keep_least=st.sampled_from([0, 0.01, 0.5]),
)
def test_a_pruned_layer_has_exactly_the_planned_tensors(subject, planned, biases, decomposition, keep_least):
    dense = subject(query_heads=planned.query_heads, kv_heads=planned.kv_heads, biases=biases)
    planned = dense.config.with_biases(planned)
    method = Olica(decomposition=decomposition, keep_least=keep_least)
    profile = method.profile(dense.layer, dense.statistics(method.dense_moments(dense.layer.shape)))
    statistics = dense.statistics(method.pruning_moments(dense.layer.shape, planned))
    pruned = method.prune(dense.layer, planned, statistics, profile, dense.observe)
    assert pruned.shape == planned
    tensors = state_of(pruned)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == layer_tensor_shapes(
        dense.config, 0, planned
    )
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in tensors.values())
    assert dense.run(pruned).isfinite().all()


def test_a_layer_planned_as_it_is_stays_as_it_is(subject):
    dense, method = subject(), Olica()
    shape = dense.layer.shape
    profile = method.profile(dense.layer, dense.statistics(method.dense_moments(shape)))
    statistics = dense.statistics(method.pruning_moments(shape, shape))
    assert method.prune(dense.layer, shape, statistics, profile, dense.observe) is dense.layer


def test_a_silent_layer_is_pruned_without_dividing_by_zero(subject):
    """Calibration text on which attention and FFN read nothing but zeros."""
    dense, method = subject(biases=False), Olica()
    silent = replace(
        dense.layer,
        attention_norm=torch.zeros_like(dense.layer.attention_norm),
        ffn_norm=torch.zeros_like(dense.layer.ffn_norm),
    )
    planned = replace(silent.shape, value_dim=5, ffn_width=22, query_rank=9, key_rank=4, calibration_rank=3)
    profile = method.profile(silent, dense.statistics(method.dense_moments(silent.shape), silent))
    statistics = dense.statistics(method.pruning_moments(silent.shape, planned), silent)
    pruned = method.prune(silent, planned, statistics, profile, dense.observe)
    assert pruned.shape == planned
    assert all(tensor.isfinite().all() for tensor in state_of(pruned).values())
    assert profile["ffn_linearity"] == 0
