"""Operations and sizes, against PyTorch's own count of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distprune.backward import ALL_TAPS, backward
from distprune.config import DistillConfig
from distprune.decoder_layer import LayerShape, layer_from_state
from distprune.engine.stages import dense_pass
from distprune.engine.scheduler import relay
from distprune.forward import LayerRunner
from distprune.modeling import PrunedConfig, PrunedDecoderLayer
from distprune.planning import scenario
from distprune.planning.rates import RATES
from distprune.planning.work import (
    Work,
    backward_flops,
    forward_flops,
    moment_size,
    moment_work,
    tap_widths,
    update_parameters,
)
from distprune.statistics import Cross, Gram, HeadGram, LayerStatistics, Mean, Peak, Power, ScalingPower
from distprune.statistics.products import TILE
from distprune.distillation.trainable import TrainableLayer

CONFIG = PrunedConfig(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=16,
    attn_implementation="sdpa",
)
SAMPLES, LENGTH = 6, 8
SHAPES = [
    CONFIG.layer_shape(0),
    LayerShape(4, 2, 8, 8, ffn_width=24, query_rank=8, key_rank=4, calibration_rank=2),
    LayerShape(2, 1, 8, 8, ffn_width=40),
]
MOMENTS = [
    Gram("ffn_neurons"),
    Gram("attention_values"),
    Cross("ffn_input", "ffn_neurons"),
    HeadGram("attention_values", 4),
    Mean("ffn_output"),
    Power("attention_output"),
    Peak("attention_input"),
    ScalingPower("queries", "queries", 2, 4),
]


def product_flops(total, x, y, **_) -> int:
    return 2 * math.prod(x) * y[-1]


# Products added in place, which the counter doesn't know.
IN_PLACE = {torch.ops.aten.addmm_: product_flops, torch.ops.aten.baddbmm_: product_flops}


def run(shape: LayerShape, observe=None) -> None:
    module = PrunedDecoderLayer(CONFIG, 0, shape)
    layer = layer_from_state({name: tensor.detach() for name, tensor in module.state_dict().items()}, shape)
    runner = LayerRunner(CONFIG, torch.device("cpu"), torch.float32, micro_batch=3)
    runner.run(layer, 0, torch.randn(SAMPLES, LENGTH, 32), observe=observe)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_forward_pass_counts_every_product(shape):
    # The fused kernels' products are not counted on every device.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(shape)
    assert forward_flops(shape, 32, SAMPLES, LENGTH) == pytest.approx(counter.get_total_flops(), rel=0.02)


def run_back(observe=None) -> None:
    shape = CONFIG.layer_shape(0)
    state = PrunedDecoderLayer(CONFIG, 0, shape).state_dict()
    layer = layer_from_state({name: tensor.detach() for name, tensor in state.items()}, shape)
    runner, hidden_states = LayerRunner(CONFIG, torch.device("cpu"), torch.float32, 3), torch.randn(SAMPLES, LENGTH, 32)
    backward(runner, layer, 0, hidden_states, hidden_states, observe=observe)


def test_a_backward_pass_counts_every_product_and_weights_get_no_gradients():
    shape = CONFIG.layer_shape(0)
    state = PrunedDecoderLayer(CONFIG, 0, shape).state_dict()
    layer = layer_from_state({name: tensor.detach() for name, tensor in state.items()}, shape)
    runner = LayerRunner(CONFIG, torch.device("cpu"), torch.float32, micro_batch=3)
    module = runner.build(layer, 0, torch.float32).requires_grad_(False)
    with sdpa_kernel(SDPBackend.MATH):
        output = runner.forward(module, 0, torch.randn(SAMPLES, LENGTH, 32, requires_grad=True))
        with FlopCounterMode(display=False) as counter:
            output.sum().backward()
    assert backward_flops(shape, 32, SAMPLES, LENGTH) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_every_tap_is_as_wide_as_it_says():
    seen = []
    run_back(lambda taps: seen.append({tap: activation.shape[1] for tap, activation in taps.items()}))
    assert seen[0] == tap_widths(CONFIG.layer_shape(0), 32)
    assert set(seen[0]) == set(ALL_TAPS)


@pytest.mark.parametrize("moment", MOMENTS, ids=repr)
def test_a_moment_is_as_large_as_it_says_and_counts_its_products(moment):
    counted = []

    def observe(activations):
        with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
            statistics.update(activations)
        counted.append(counter.get_total_flops())

    statistics = LayerStatistics([moment])
    run(SHAPES[0], observe)
    widths = tap_widths(SHAPES[0], 32)
    assert statistics._totals[moment].numel() == moment_size(moment, widths)
    work = moment_work(moment, widths, SAMPLES * LENGTH, batches=2, itemsize=4)
    assert work.statistics == sum(counted)


def test_a_wide_gram_matrix_counts_what_its_tiles_compute():
    moment, width = Gram("ffn_neurons"), 5 * TILE // 2
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as counter:
        LayerStatistics([moment]).update({"ffn_neurons": torch.randn(3, width)})
    work = moment_work(moment, {"ffn_neurons": width}, 3, batches=1, itemsize=4)
    assert work.statistics == counter.get_total_flops() < 0.75 * 2 * 3 * width**2


def test_work_adds_up_and_takes_as_long_as_its_rates_say():
    rates = RATES["h100"]
    once, twice = Work(forward=rates.forward, solve_float64=rates.float64), Work(forward=rates.forward, read=rates.read)
    assert (once + twice * 2).seconds(rates) == pytest.approx(3 + 1 + 2)
    assert Work(forward=rates.forward_float32).seconds(rates, float32=True) == pytest.approx(1)
    assert Work(statistics=rates.products).seconds(rates) == pytest.approx(1)


def test_a_relay_is_parted_and_kept_as_the_engine_does():
    assert scenario.PIECES_PER_WORKER == relay.PIECES_PER_WORKER
    assert scenario.KEPT_EVERY == dense_pass.KEPT_EVERY


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [3, 1000])
def test_low_rank_updates_have_the_parameters_that_train(shape, rank):
    state = PrunedDecoderLayer(CONFIG, 0, shape).state_dict()
    runner = LayerRunner(CONFIG, torch.device("cpu"), torch.float32, micro_batch=2)
    trainable = TrainableLayer(layer_from_state(state, shape), 0, runner, DistillConfig(train="lora", rank=rank))
    trained = sum(parameter.numel() for parameter in trainable.parameters.values())
    assert update_parameters(shape, CONFIG.hidden_size, rank) == trained
