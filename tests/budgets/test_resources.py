"""Amounts of every resource, against transformers' own models: their elements, caches and a count of FLOPs; and against
sums written out by hand where no plain model has the shape."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_architectures import BIASES, tiny
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from distprune.budgets import (
    RESOURCES,
    StoredSizes,
    Target,
    attention_amount,
    decoder_parameters,
    ffn_amount,
    layer_amount,
    layer_parameters,
    outer_parameters,
    rest_amount,
)
from distprune.budgets import resources as module
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape

FAMILIES = {
    "llama": {},
    "llama with biases": BIASES,
    "tied": {"tie_word_embeddings": True},
    "qwen3": {},
    "nemotron": {},
    "starcoder2": {"use_bias": True},
    "gpt_neox": {},
    "mixtral": {},
    "deepseek_v3": {},
    "gemma2": {},
}
#: All but latency, which is measured: tests/latency has its tests.
COUNTED = [resource for resource in RESOURCES if resource != "latency"]
ANY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
#: What plain configurations can say, and what those call it.
SMALLER = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 40}


def model_of(family: str, **changes):
    model_type = family.split()[0] if family != "tied" else "llama"
    return tiny(model_type, **FAMILIES[family] | changes)


def built(model, dtype: torch.dtype = torch.float32):
    return AutoModelForCausalLM.from_config(model.config, dtype=dtype, attn_implementation="eager").eval()


# ------------------------------------------------------------------ parameters


@ANY_FAMILY
def test_the_dense_layers_and_what_is_outside_of_them_hold_the_models_parameters(family):
    model = model_of(family)
    real = built(model)
    layers = real.get_submodule(model.layers_path)
    shapes = [model.dense_shape(index) for index in range(3)]
    assert [layer_parameters(model, index, shapes[index]) for index in range(3)] == list(map(elements, layers))
    assert decoder_parameters(model, shapes) == elements(layers)
    assert outer_parameters(model) == elements(real) - elements(layers)


def elements(module) -> int:
    """Of all tensors that a checkpoint has, those that serve twice counted once."""
    return sum({tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}.values())


@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen3"])
def test_layers_with_fewer_heads_and_neurons_hold_what_a_model_of_that_size_does(family):
    model, smaller = model_of(family), model_of(family, **SMALLER)
    shapes = [smaller.dense_shape(index) for index in range(3)]
    assert decoder_parameters(model, shapes) == elements(built(smaller).model.layers)


def test_factors_branches_and_added_biases_count():
    model, hidden = tiny(), 24
    attention = AttentionShape(4, 2, 6, 5, query_rank=9, key_rank=4, output_rank=7, output_bias=True)
    factors = 9 * (hidden + 24) + 4 * (hidden + 12) + 7 * (20 + hidden) + hidden
    assert attention_amount("parameters", model, 0, attention) == factors + 10 * hidden
    ffn = FeedForwardShape(40, branch_rank=3, down_bias=True)
    assert ffn_amount("parameters", model, 0, ffn) == 3 * 40 * hidden + 2 * 3 * hidden + hidden
    assert layer_parameters(model, 0, LayerShape(attention, ffn)) == factors + 10 * hidden + 127 * hidden + 2 * hidden


@pytest.mark.parametrize("resource", COUNTED)
def test_a_part_that_is_not_there_takes_nothing_and_the_rest_stays(resource):
    model = tiny()
    assert attention_amount(resource, model, 0, None) == ffn_amount(resource, model, 0, None) == 0
    counted = {"parameters": 48, "active-parameters": 48, "bytes": 48 * model.dtype.itemsize}
    norms = counted.get(resource, 0)
    assert layer_amount(resource, model, 0, LayerShape(None, None)) == rest_amount(resource, model, 0) == norms


# ------------------------------------------------------------------ the other resources


def test_bytes_are_of_the_dtype_of_the_model_or_of_each_tensor_as_it_is_stored():
    model = tiny(dtype="bfloat16")
    shape = model.dense_shape(0).with_ffn(branch_rank=3, down_bias=True)
    assert layer_amount("bytes", model, 0, shape) == 2 * layer_parameters(model, 0, shape)
    wide = {name: 4 if "down_proj" in name else 2 for name in model.layer_tensors(0, model.dense_shape(0))}
    added = ffn_amount("bytes", model, 0, shape.ffn, wide) - ffn_amount("bytes", model, 0, shape.ffn)
    assert added == 2 * (96 * 24 + 24 + 2 * 3 * 24)  # an added bias and a branch are as wide as the down projection
    target = Target(model, 0.1, count_embeddings=True, resource="bytes", sizes=StoredSizes((wide,) * 3, 1000))
    assert target.counted - target.dense == 1000
    assert target.amount([shape] * 3) == 3 * layer_amount("bytes", model, 0, shape, wide)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [{}, SMALLER], ids=["dense", "smaller"])
@pytest.mark.parametrize("family", ["llama", "llama with biases", "qwen3", "nemotron", "gemma2"])
def test_flops_are_those_that_torch_counts_for_one_more_token(family, sizes, monkeypatch):
    seen = 11
    monkeypatch.setattr(module, "CONTEXT", seen)
    model, smaller = model_of(family), model_of(family, **sizes)
    real = built(smaller)
    cache = real(torch.arange(seen - 1)[None], use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        real(torch.tensor([[3]]), past_key_values=cache)
    expected = sum(layer_amount("flops", model, index, smaller.dense_shape(index)) for index in range(3))
    assert counter.get_total_flops() == expected + module.outer_amount("flops", model) + rotary_flops(counter)


def rotary_flops(counter: FlopCounterMode) -> int:
    """Of the angles of rotary embedding, which are computed once for all layers."""
    modules = counter.get_flop_counts()
    return sum(sum(flops.values()) for name, flops in modules.items() if name.endswith("rotary_emb"))


def test_a_sliding_window_bounds_what_attention_looks_at():
    layers = ("sliding_attention", "full_attention", "full_attention")
    model = tiny("qwen2", use_sliding_window=True, sliding_window=100, layer_types=layers)
    shape = model.dense_shape(0).attention
    sliding, full = (attention_amount("flops", model, index, shape) for index in (0, 1))
    assert full - sliding == 2 * 4 * 2 * shape.value_dim * (module.CONTEXT - 100)
    target = Target(model, 0.1, resource="flops")
    assert [target.attention_amount(index, shape) for index in range(3)] == [sliding, full, full]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [{}, SMALLER], ids=["dense", "smaller"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox"])
def test_the_kv_cache_is_as_large_as_the_one_that_a_model_fills(family, sizes, dtype):
    if family == "gpt_neox":
        sizes = {}
    model, smaller = model_of(family, dtype=dtype), model_of(family, **sizes)
    cache = built(smaller, dtype)(torch.arange(7)[None], use_cache=True).past_key_values
    for index in range(3):
        shape = smaller.dense_shape(index)
        held = sum(tensor.nbytes for tensor in (cache.layers[index].keys, cache.layers[index].values))
        assert 7 * attention_amount("kv-cache", model, index, shape.attention) == held
        assert ffn_amount("kv-cache", model, index, shape.ffn) == rest_amount("kv-cache", model, index) == 0


# ------------------------------------------------------------------ targets


@ANY_FAMILY
@pytest.mark.parametrize("resource", COUNTED)
def test_a_target_is_a_fraction_of_its_resource(family, resource):
    model = model_of(family)
    target = Target(model, 0.3, resource=resource)
    shapes = target.dense_shapes
    assert target.dense == sum(layer_amount(resource, model, index, shape) for index, shape in enumerate(shapes))
    assert target.remaining == target.dense - round(0.3 * target.dense)
    fewer = [replace(shapes[0], ffn=None), replace(shapes[1], attention=None), shapes[2]]
    assert target.amount(fewer) == sum(layer_amount(resource, model, index, s) for index, s in enumerate(fewer))
    counted = Target(model, 0.3, count_embeddings=True, resource=resource)
    assert counted.counted == target.dense + module.outer_amount(resource, model)
