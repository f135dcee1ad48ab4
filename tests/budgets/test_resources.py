"""Amounts of every resource, against real models: their elements, their files, their caches and a count of FLOPs."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

from distprune.budgets import RESOURCES, Target, amount, attention_amount, ffn_amount
from distprune.budgets import resources as module
from distprune.modeling import LayerShape, PrunedForCausalLM

SHAPES = [
    LayerShape(4, 2, 8, 5, ffn_width=40, query_rank=9, key_rank=4, calibration_rank=3),
    LayerShape(3, 1, 8, 8, ffn_width=7, query_rank=5),
    LayerShape(4, 2, 8, 8, ffn_width=96),
]
BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


@pytest.fixture(params=[{}, BIASES, {"query_key_norm": True, "tie_word_embeddings": True}], ids=str)
def dense(request, tiny_config):
    return tiny_config(**request.param)


def model_of(dense, dtype=torch.float32):
    config = type(dense)(**{**dense.to_dict(), "layer_shapes": [asdict(shape) for shape in SHAPES]})
    config._attn_implementation = "eager"
    return PrunedForCausalLM(config).to(dtype).eval()


def test_parameters_and_bytes_are_those_of_the_modules_with_their_norms(dense, tmp_path):
    dense.dtype = torch.bfloat16
    for index, layer in enumerate(model_of(dense, torch.bfloat16).model.layers):
        parts = {
            attention_amount: {**named(layer, "self_attn"), **named(layer, "input_layernorm")},
            ffn_amount: {**named(layer, "mlp"), **named(layer, "post_attention_layernorm")},
        }
        for count, tensors in parts.items():
            assert count("parameters", dense, index, SHAPES[index]) == sum(map(torch.numel, tensors.values()))
            save_file(tensors, tmp_path / "part.safetensors")
            size = (tmp_path / "part.safetensors").stat().st_size
            header = 8 + int.from_bytes((tmp_path / "part.safetensors").read_bytes()[:8], "little")
            assert count("bytes", dense, index, SHAPES[index]) == size - header


def named(layer, name: str) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": tensor for key, tensor in getattr(layer, name).state_dict().items()}


@torch.no_grad()
def test_flops_are_those_that_torch_counts_for_one_more_token(dense, monkeypatch):
    seen = 11
    monkeypatch.setattr(module, "CONTEXT", seen)
    model = model_of(dense)
    cache = model(torch.arange(seen - 1)[None], use_cache=True).past_key_values
    with FlopCounterMode(display=False) as counter:
        model(torch.tensor([[3]]), past_key_values=cache)
    counted = counter.get_total_flops()
    expected = sum(amount("flops", dense, index, shape) for index, shape in enumerate(SHAPES))
    assert counted == expected + module.outer_amount("flops", dense) + rotary_flops(counter)


def rotary_flops(counter: FlopCounterMode) -> int:
    """Of the angles of rotary embedding, which are computed once for all layers."""
    modules = counter.get_flop_counts()
    return sum(sum(flops.values()) for name, flops in modules.items() if name.endswith("rotary_emb"))


def test_a_sliding_window_bounds_what_attention_looks_at(tiny_config):
    layers = ["sliding_attention", "full_attention", "full_attention"]
    config = tiny_config(sliding_window=100, layer_types=layers)
    shape = config.layer_shape(0)
    sliding, full = (attention_amount("flops", config, index, shape) for index in (0, 1))
    assert full - sliding == 2 * 4 * (8 + 8) * (module.CONTEXT - 100)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kv_cache_is_as_large_as_the_one_that_a_model_fills(dense, dtype):
    dense.dtype = dtype
    cache = model_of(dense, dtype)(torch.arange(7)[None], use_cache=True).past_key_values
    for index, shape in enumerate(SHAPES):
        held = sum(tensor.nbytes for tensor in (cache.layers[index].keys, cache.layers[index].values))
        assert 7 * attention_amount("kv-cache", dense, index, shape) == held
        assert ffn_amount("kv-cache", dense, index, shape) == 0


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_modules_amount_is_its_own(dense, resource):
    first, second = SHAPES[:2]
    mixed = replace(second, ffn_width=first.ffn_width, calibration_rank=first.calibration_rank)
    assert attention_amount(resource, dense, 0, mixed) == attention_amount(resource, dense, 0, second)
    assert ffn_amount(resource, dense, 0, mixed) == ffn_amount(resource, dense, 0, first)


@pytest.mark.parametrize("resource", RESOURCES)
def test_a_target_is_a_fraction_of_its_resource(dense, resource):
    target = Target(dense, 0.3, resource=resource)
    assert target.dense == sum(amount(resource, dense, index, dense.layer_shape(index)) for index in range(3))
    assert target.remaining == target.dense - round(0.3 * target.dense)
    assert target.amount(SHAPES) == sum(amount(resource, dense, index, shape) for index, shape in enumerate(SHAPES))
    counted = Target(dense, 0.3, count_embeddings=True, resource=resource)
    assert counted.counted == target.dense + module.outer_amount(resource, dense)
