"""Measuring: what is run is the family's own layer in the shapes that a plan may choose from."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from latency_tables import by_parameters, made_up_table
from tiny_architectures import BIASES, tiny

from distprune.errors import InputError
from distprune.latency.measured_shapes import measured_grids
from distprune.latency.measuring_latency import LatencyOptions, check_options, measure
from distprune.latency.random_layers import random_layer
from distprune.latency.timing_layers import Timer, with_cache

CPU = torch.device("cpu")
FAMILIES = {"llama": BIASES, "qwen3": {}, "gemma2": {}, "opt": {}, "phi3": {}, "gpt_neox": {}, "nemotron": {}}
POSITIONS = {"max_position_embeddings": 256}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_shape_is_built_with_the_tensors_that_it_has(family):
    model = tiny(family, **FAMILIES[family])
    for grid in measured_grids(model, 0):
        for shape in grid.shapes:
            module = random_layer(model, 0, shape, CPU, torch.float32)
            found = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
            assert found == model.layer_tensors(0, shape)
            assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def test_a_new_token_is_decoded_after_those_in_the_cache():
    """With a layer's own cache, the last token's output is that of all tokens together."""
    model = tiny("gemma2", **POSITIONS)
    timer = Timer(model, 1, CPU, torch.float32, 1)
    for shape in (model.dense_shape(1), model.dense_shape(1).with_attention(query_heads=2, kv_heads=1)):
        module = random_layer(model, 1, shape, CPU, torch.float32)
        states = torch.randn(2, 10, model.hidden_size)
        filled = timer._empty_cache()
        found = []
        with torch.inference_mode():
            for part, before in ((states[:, :9], 0), (states[:, 9:], 9)):
                call, cache = timer._call(2, part.shape[1], before)
                call = with_cache(call, cache, filled)
                found.append(module(part, *call.arguments, **call.keywords))
            call, cache = timer._call(2, 10, 0)
            whole = module(states, *call.arguments, **call.keywords)
        assert torch.allclose(found[1][:, 0], whole[:, 9], atol=1e-5)
        assert not torch.allclose(found[1][:, 0], whole[:, 8], atol=1e-2)


def test_a_table_is_made_of_what_the_timer_says(monkeypatch):
    model = tiny(**POSITIONS)

    def as_made_up(timer, modules, workloads):
        assert [workload.kind for workload in workloads] == ["prefill", "decode"]
        return {shape: by_parameters(model, timer.index, shape) for shape in modules}

    monkeypatch.setattr(Timer, "seconds", as_made_up)
    table = measure(model, LatencyOptions(prompt=128, new=32, threads=1), CPU, torch.float32)
    assert table.kinds == made_up_table(model).kinds
    prefill, decode = table.workloads
    assert (prefill.tokens, prefill.weight, decode.tokens, decode.weight) == (128, 1, 144, 32)
    assert (table.layers, table.dtype, table.model_type) == ([0, 0, 0], "float32", "llama")


def test_layers_of_several_kinds_are_measured_each(monkeypatch):
    model, seen = tiny("gemma2", **POSITIONS), []
    monkeypatch.setattr(Timer, "seconds", lambda timer, modules, _: seen.append(timer.index) or dict.fromkeys(
        modules, np.ones(2)))  # fmt: skip
    table = measure(model, LatencyOptions(), CPU, torch.float32)
    assert (seen, table.layers) == ([0, 1], [0, 1, 0])


def test_a_tiny_model_is_measured():
    told = []
    model = tiny(hidden_size=16, num_attention_heads=1, num_key_value_heads=1, intermediate_size=16, **POSITIONS)
    options = LatencyOptions(prompt=8, new=4, rounds=2)
    table = measure(model, options, CPU, torch.float32, lambda *rounds: told.append(rounds))
    assert told == [(done, 6) for done in range(1, 7)]
    assert (table.kinds[0].rest.array > 0).all()
    # So tiny a part may take no measurable time, but never less than none.
    assert (table.layer_seconds(0, model.dense_shape(0)) >= table.kinds[0].rest.array).all()


def test_no_part_takes_less_than_nothing_whatever_the_clock_says(monkeypatch):
    def faster_with_more(timer, modules, workloads):
        return {shape: np.full(2, 1e-3) - 1e-6 * by_parameters(timer.model, 0, shape) for shape in modules}

    monkeypatch.setattr(Timer, "seconds", faster_with_more)
    kind = measure(tiny(**POSITIONS), LatencyOptions(), CPU, torch.float32).kinds[0]
    assert (kind.attention.array == 0).all()
    assert (kind.ffn.array == 0).all()


def test_batches_share_the_weight_and_what_weighs_nothing_is_not_measured():
    found = LatencyOptions(batches=(1, 4), prompt=10, new=6).workloads()
    assert [(each.kind, each.batch, each.weight) for each in found] == [
        ("prefill", 1, 1 / 2),
        ("decode", 1, 3.0),
        ("prefill", 4, 1 / 8),
        ("decode", 4, 0.75),
    ]
    assert [each.kind for each in LatencyOptions(new=0).workloads()] == ["prefill"]
    assert [each.kind for each in LatencyOptions(prefill_weight=0).workloads()] == ["decode"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (0,)}, "--batch 0: at least 1"),
        ({"prompt": 0}, "--prompt 0: at least 1"),
        ({"rounds": 0}, "--rounds 0: at least 1"),
        ({"new": -1}, "--new -1 .*must be 0 or more"),
        ({"prefill_weight": float("nan")}, "--prefill-weight nan: must be 0 or more"),
        ({"new": 0, "prefill_weight": 0}, "leave nothing to measure"),
        ({"prompt": 300}, "are 332 tokens together, and the model takes 256"),
    ],
)
def test_options_that_can_not_be_met_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        check_options(LatencyOptions(**options), tiny(**POSITIONS))


def test_mixtures_of_experts_are_refused():
    with pytest.raises(InputError, match="measure-latency: the latency of mixtures"):
        measure(tiny("mixtral"), LatencyOptions(), CPU, torch.float32)
