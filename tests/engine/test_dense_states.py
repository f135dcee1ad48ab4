"""How far a layer is from the dense model's hidden states, compared with what transformers' own layers give."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_architectures import tiny

from distprune.engine.worker.dense_states import DenseStates
from distprune.layers.runner import LayerRunner
from distprune.layers.sites import ATTENTION_ERROR, FFN_ERROR, NEURONS

WIDTH = 24


@pytest.fixture
def around():
    """Builds a random dense layer, a variation of it, hidden states before both, and what tells the errors."""

    def build(model_type: str, dtype: torch.dtype = torch.float32):
        model = tiny(model_type, num_hidden_layers=1)
        generator = torch.Generator().manual_seed(0)
        dims = model.layer_tensors(0, model.dense_shape(0))
        state = {
            name: 1.0 * ("norm" in name) + 0.2 * torch.randn(each, generator=generator) for name, each in dims.items()
        }
        layer = model.layer_from_state(0, state)
        dense = torch.randn(7, 5, model.hidden_size, generator=generator).to(dtype)
        own = dense + 0.3 * torch.randn(dense.shape, generator=generator).to(dtype)
        runner = LayerRunner(model, torch.device("cpu"), dtype, micro_batch=3)
        down = replace(layer.ffn.down, weight=0.7 * layer.ffn.down.weight)
        variation = replace(layer, ffn=replace(layer.ffn, down=down))
        return runner, layer, variation, dense, own

    return build


def seen_in(runner, states: DenseStates, variation, own, sites) -> dict:
    """What the observer of a pass over the variation is shown, over all micro-batches."""
    batches: list[dict] = []
    observe, tapped = states.observing(lambda seen: batches.append(dict(seen)), sites)
    runner.observe(variation, 0, own, observe, tapped)
    return {site: torch.cat([batch[site] for batch in batches]) for site in sites}


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "olmo2", "nemotron"])
def test_an_error_after_the_ffn_is_what_outputs_differ_by(around, model_type):
    runner, layer, variation, dense, own = around(model_type)
    output = runner.run(layer, 0, dense)
    states = DenseStates(runner, layer, 0, dense, output)
    error = seen_in(runner, states, variation, own, {FFN_ERROR, NEURONS})[FFN_ERROR]
    expected = (output - runner.run(variation, 0, own)).flatten(0, 1)
    if model_type == "olmo2":  # which normalizes what its parts give
        assert not states.adds_outputs and not error.any()
    else:
        assert states.adds_outputs
        torch.testing.assert_close(error, expected, atol=1e-5, rtol=1e-5)


def test_an_error_after_attention_is_what_a_layer_without_ffn_differs_by(around):
    runner, layer, variation, dense, own = around("llama")
    states = DenseStates(runner, layer, 0, dense, runner.run(layer, 0, dense))
    error = seen_in(runner, states, variation, own, {ATTENTION_ERROR})[ATTENTION_ERROR]
    without = replace(layer, ffn=None)
    expected = (runner.run(without, 0, dense) - runner.run(without, 0, own)).flatten(0, 1)
    torch.testing.assert_close(error, expected, atol=1e-5, rtol=1e-5)


def test_rounding_to_16_bits_does_not_hide_that_outputs_are_added(around):
    runner, layer, _, dense, _ = around("llama", torch.bfloat16)
    assert DenseStates(runner, layer, 0, 30 * dense, runner.run(layer, 0, 30 * dense)).adds_outputs


def test_without_errors_asked_for_nothing_more_is_seen(around):
    runner, layer, variation, dense, own = around("llama")
    states = DenseStates(runner, layer, 0, dense, dense)
    assert seen_in(runner, states, variation, own, {NEURONS}).keys() == {NEURONS}
