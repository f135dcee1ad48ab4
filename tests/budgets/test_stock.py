"""Which shapes the original architecture can describe."""

from __future__ import annotations

from dataclasses import replace

from distprune.budgets import has_plain_heads, is_stock


def test_layers_that_lost_whole_heads_and_neurons_alike_are_stock(tiny_config):
    config = tiny_config()
    dense = config.dense_shape()
    smaller = replace(dense, query_heads=2, kv_heads=1, ffn_width=16)
    assert is_stock(config, [dense] * 3) and is_stock(config, [smaller] * 3)
    assert not is_stock(config, [dense, dense, smaller])
    for change in ({"value_dim": 4}, {"query_rank": 3}, {"calibration_rank": 2}, {"down_bias": True}):
        assert not is_stock(config, [replace(dense, **change)] * 3)


def test_heads_divide_the_hidden_size_or_are_all_there(tiny_config):
    config = tiny_config(num_attention_heads=10, num_key_value_heads=10)  # of a hidden size of 24
    heads = [replace(config.dense_shape(), query_heads=count, kv_heads=count) for count in (10, 9, 8, 7, 6)]
    assert [has_plain_heads(config, shape) for shape in heads] == [True, False, True, False, True]
