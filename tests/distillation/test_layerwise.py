"""Distillation of one layer: against transformers' own decoder layer trained by hand, and what it may not do."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from distprune.config import DistillConfig
from distprune.distillation import layerwise
from distprune.distillation.layerwise import Batch, distill, rate_for, relative_error, split, warmup_and_cosine
from distprune.layers.architecture import Architecture
from distprune.layers.parts import DecoderLayer, Linear
from distprune.layers.runner import LayerRunner
from distprune.layers.shapes import LayerShape

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
SAMPLES, LENGTH = 24, 6


def architecture_of(layers: int) -> Architecture:
    return Architecture(LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=16))


MODEL = architecture_of(1)
DENSE = MODEL.dense_shape(0)
NARROW = DENSE.with_ffn(width=24)
FACTORED = NARROW.with_attention(value_dim=4, query_rank=8, key_rank=8).with_ffn(branch_rank=4)


def random_layer(shape: LayerShape, seed: int, dtype: torch.dtype = torch.float32) -> DecoderLayer:
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: torch.randn(dims, generator=generator) * 0.2 + (name.endswith("layernorm.weight"))
        for name, dims in MODEL.layer_tensors(0, shape).items()
    }
    state = {name: tensor.to(dtype) for name, tensor in state.items()}
    return MODEL.names(0).layer_from_state(state, shape)


def state_of(layer: DecoderLayer) -> dict[str, torch.Tensor]:
    return MODEL.names(0).state_of(layer)


def make_runner(dtype: torch.dtype = torch.float32, layers: int = 1) -> LayerRunner:
    return LayerRunner(architecture_of(layers), torch.device("cpu"), dtype, micro_batch=5)


@pytest.fixture(scope="module")
def hidden_states() -> tuple[torch.Tensor, torch.Tensor]:
    """What goes into a dense layer and what comes out."""
    inputs = torch.randn(SAMPLES, LENGTH, 32, generator=torch.Generator().manual_seed(0))
    return inputs, make_runner().run(random_layer(DENSE, 1), 0, inputs).clone()


def alone(hidden_states: tuple[torch.Tensor, torch.Tensor]) -> Batch:
    """Without layers to look ahead to."""
    inputs, outputs = hidden_states
    return Batch(inputs, outputs, outputs)


def error(layer: DecoderLayer, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """In float64 by numpy."""
    found, wanted = (x.double().numpy() for x in (make_runner().run(layer, 0, inputs), targets))
    return float((((found - wanted) ** 2).sum(axis=-1) / (wanted**2).sum(axis=-1)).mean())


def differing(one: DecoderLayer, other: DecoderLayer) -> set[str]:
    states = state_of(one), state_of(other)
    assert states[0].keys() == states[1].keys()
    return {name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])}


@pytest.mark.parametrize("epochs", [1, 3])
def test_a_full_layer_trains_as_the_decoder_layer_of_transformers_does_by_hand(hidden_states, epochs):
    options = DistillConfig(epochs=epochs, learning_rate=1e-2, batch=4, held_out=0.25, seed=3)
    pruned = random_layer(NARROW, 2)
    found, report = distill(pruned, 0, [], alone(hidden_states), make_runner(), options)

    config = LlamaConfig(**SIZES | {"intermediate_size": 24}, attn_implementation="sdpa", rms_norm_eps=1e-6)
    module = LlamaDecoderLayer(config, 0)
    module.load_state_dict(copy.deepcopy(state_of(pruned)))
    positions = torch.arange(LENGTH)[None]
    embeddings = LlamaRotaryEmbedding(config)(hidden_states[0], positions)
    training, held_out = split(SAMPLES, options)
    assert sorted([*training, *held_out]) == list(range(SAMPLES)) and len(held_out) == SAMPLES // 4

    def loss(batch):
        x, y = (states[batch] for states in hidden_states)
        output = module(x, position_embeddings=embeddings)
        return ((output - y).norm(dim=-1) / y.norm(dim=-1)).square().mean()

    optimizer = torch.optim.AdamW(module.parameters(), betas=(0.9, 0.95), weight_decay=0.0)
    generator, step, losses = torch.Generator().manual_seed(3), 0, []
    steps = epochs * math.ceil(len(training) / 4)
    with torch.no_grad():
        before = loss(held_out).item()
    for _ in range(epochs):
        for batch in torch.randperm(len(training), generator=generator).split(4):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            value = loss(training[batch])
            value.backward()
            optimizer.step()
            step += 1
            losses.append(value.item())
    with torch.no_grad():
        after = loss(held_out).item()

    assert report.kept and after < before
    np.testing.assert_allclose([report.held_out_before, report.held_out_after], [before, after], rtol=1e-4)
    np.testing.assert_allclose(report.training, losses, rtol=1e-3)
    for name, tensor in module.state_dict().items():
        torch.testing.assert_close(state_of(found)[name], tensor, rtol=1e-3, atol=1e-4)


def test_dense_layers_that_follow_judge_the_output_and_stay_as_they_are(hidden_states):
    """The loss is the error of the layer's output, and of what the next layers make of it."""
    runner = make_runner(layers=3)
    pruned, following = random_layer(NARROW, 2), [random_layer(DENSE, seed) for seed in (3, 4)]
    copies = copy.deepcopy(following)
    options = DistillConfig(learning_rate=1e-2, epochs=4)
    ahead = hidden_states[1]
    for index, layer in enumerate(following, 1):
        ahead = runner.run(layer, index, ahead)
    learnt, report = distill(pruned, 0, following, Batch(*hidden_states, ahead.clone()), runner, options)
    assert report.kept and not any(differing(*pair) for pair in zip(following, copies, strict=True))

    inputs, targets = (states[split(SAMPLES, options)[1]] for states in hidden_states)

    def both_errors(layer: DecoderLayer) -> float:
        outputs, wanted = runner.run(layer, 0, inputs), targets
        first = error(layer, inputs, targets)
        for index, dense in enumerate(following, 1):
            outputs, wanted = (runner.run(dense, index, states) for states in (outputs, wanted))
        outputs, wanted = outputs.double().numpy(), wanted.double().numpy()
        return first + float((((outputs - wanted) ** 2).sum(axis=-1) / (wanted**2).sum(axis=-1)).mean())

    found = [report.held_out_before, report.held_out_after]
    np.testing.assert_allclose(found, [both_errors(pruned), both_errors(learnt)], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_and_linear_branch_learn_too(hidden_states, dtype):
    pruned = random_layer(FACTORED, 2, dtype)
    options = DistillConfig(epochs=8, learning_rate=1e-2)
    learnt, report = distill(pruned, 0, [], alone(hidden_states), make_runner(dtype), options)
    assert learnt.shape == FACTORED
    assert {tensor.dtype for tensor in state_of(learnt).values()} == {dtype}
    assert differing(pruned, learnt) == set(state_of(pruned))
    held_out = split(SAMPLES, options)[1]
    before, after = (error(layer, *(x[held_out] for x in hidden_states)) for layer in (pruned, learnt))
    assert after < 0.8 * before
    assert report.held_out_after == pytest.approx(after, rel=0.05 if dtype == torch.bfloat16 else 1e-4)


def test_a_layer_that_does_not_get_better_on_held_out_samples_stays_as_it_was(hidden_states):
    pruned = random_layer(NARROW, 2)
    layer, report = distill(pruned, 0, [], alone(hidden_states), make_runner(), DistillConfig(learning_rate=100.0))
    assert report.held_out_after > report.held_out_before and not report.kept
    assert layer is pruned


def test_low_rank_updates_change_no_weight_by_more_than_their_rank(hidden_states):
    pruned = random_layer(FACTORED, 2)
    options = DistillConfig(train="lora", rank=2, epochs=4, learning_rate=1e-2)
    learnt, report = distill(pruned, 0, [], alone(hidden_states), make_runner(), options)
    assert report.kept
    assert "input_layernorm.weight" not in differing(pruned, learnt)
    for name in differing(pruned, learnt):
        change = (state_of(learnt)[name] - state_of(pruned)[name]).double().numpy()
        assert np.linalg.matrix_rank(change, tol=1e-5) == 2, name
    matrices = {name for name, tensor in state_of(pruned).items() if tensor.dim() == 2}
    assert differing(pruned, learnt) == matrices


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(hidden_states):
    pruned = random_layer(NARROW, 2)
    options = [DistillConfig(seed=seed, epochs=3, learning_rate=1e-2) for seed in (0, 0, 1)]
    made = [distill(pruned, 0, [], alone(hidden_states), make_runner(), each)[0] for each in options]
    assert not differing(made[0], made[1])
    assert differing(made[0], made[2])


def test_an_error_counts_relative_to_its_token():
    targets = torch.tensor([[3.0, 4.0], [300.0, 400.0]])
    assert relative_error(targets * 1.1, targets).item() == pytest.approx(0.01, rel=1e-4)
    assert relative_error(targets + torch.tensor([[0.0, 5.0], [0.0, 0.0]]), targets).item() == pytest.approx(0.5)


@pytest.mark.parametrize("samples", [2, 3, 100])
def test_there_is_always_something_to_learn_from_and_something_held_out(samples):
    for share in (0.001, 0.5, 0.999):
        training, held_out = split(samples, DistillConfig(held_out=share))
        assert len(training) and len(held_out)


def test_the_learning_rate_rises_and_falls_to_zero():
    factor = warmup_and_cosine(200)
    factors = [factor(step) for step in range(200)]
    assert factors[0] == pytest.approx(0.1)
    assert factors.index(max(factors)) == 9
    assert sorted(factors[9:], reverse=True) == factors[9:] and factors[199] < 1e-3


@pytest.mark.parametrize(("loss", "share"), [(0.0, 0.0), (0.01, 0.5), (0.04, 1.0), (3.0, 1.0)])
def test_layers_that_have_lost_little_learn_at_a_lower_rate(loss, share):
    assert rate_for(loss, DistillConfig(learning_rate=2e-4)) == pytest.approx(share * 2e-4)


def test_a_layer_that_is_nearly_right_gets_better_still(hidden_states, monkeypatch):
    """At the full rate it gets worse, and stays as it was."""
    dense, options = random_layer(DENSE, 1), DistillConfig(epochs=4, learning_rate=1e-2)
    near = replace(dense, ffn=replace(dense.ffn, down=Linear(dense.ffn.down.weight * 0.99)))
    _, report = distill(near, 0, [], alone(hidden_states), make_runner(), options)
    assert 0 < report.held_out_before < 1e-3
    assert report.kept and report.held_out_after < 0.9 * report.held_out_before
    monkeypatch.setattr(layerwise, "rate_for", lambda loss, options: options.learning_rate)
    _, report = distill(near, 0, [], alone(hidden_states), make_runner(), options)
    assert not report.kept
