"""What is seen of each expert, against numpy on what transformers' module for all experts is called with."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mixture_layers import EXPERTS, MIXTURES, eager_experts, output_of, routed

from distprune.layers.runner import LayerRunner
from distprune.layers.sites import (
    EXPERT_GATE,
    EXPERT_INPUT,
    EXPERT_NEURONS,
    EXPERT_OUTPUT,
    EXPERT_UP,
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    NEURONS,
    ROUTER_WEIGHT,
    SHARED_NEURONS,
    UP,
)
from distprune.methods.networks import SHARED, places_of_expert
from distprune.statistics import Cross, Gram, LayerStatistics, Mean, MeanNorm, Peak, Power


@pytest.fixture(params=MIXTURES)
def mixture(request, subject):
    return subject(request.param, **MIXTURES[request.param])


def close(ours: torch.Tensor, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours.double().numpy(), theirs, rtol=1e-4, atol=1e-6 * max(10, np.abs(theirs).max()))


def test_each_expert_is_seen_at_the_tokens_that_are_routed_to_it(mixture):
    seen = routed(mixture.model, mixture.layer, mixture.hidden_states)
    places = (EXPERT_INPUT, EXPERT_GATE, EXPERT_UP, EXPERT_NEURONS, EXPERT_OUTPUT, ROUTER_WEIGHT)
    moments = [Power(place.of(expert)) for place in places for expert in range(EXPERTS)]
    moments += [Gram(EXPERT_NEURONS.of(expert)) for expert in range(EXPERTS)]
    moments += [MeanNorm(EXPERT_OUTPUT.of(expert)) for expert in range(EXPERTS)]
    statistics = mixture.statistics(moments)
    counted = 0
    with eager_experts(mixture.model, mixture.layer) as experts:
        for expert in range(EXPERTS):
            x, weight = seen.to(expert)
            network = mixture.ffn.expert(expert)
            counted += statistics.tokens(EXPERT_INPUT.of(expert))
            assert statistics.tokens(EXPERT_INPUT.of(expert)) == len(x) > 0
            up, gate = (
                x @ each.weight.T + (0 if each.bias is None else each.bias) for each in (network.up, network.gate)
            )
            rows = up if mixture.model.config.model_type == "gpt_oss" else gate
            interleaved = torch.stack([gate, up], dim=2).flatten(1) if rows is up else torch.cat([gate, up], dim=1)
            neurons = (experts._apply_gate(interleaved) * weight).double().numpy()
            output = (output_of(experts, expert, x) * weight).double().numpy()
            for place, values in (
                (EXPERT_INPUT, x),
                (EXPERT_GATE, gate),
                (EXPERT_UP, up),
                (EXPERT_NEURONS, neurons),
                (EXPERT_OUTPUT, output),
                (ROUTER_WEIGHT, weight),
            ):
                close(statistics.power(place.of(expert)), np.square(np.asarray(values, dtype=np.float64)).mean(axis=0))
            close(statistics.gram(EXPERT_NEURONS.of(expert)), neurons.T @ neurons / len(x))
            close(statistics.mean_norm(EXPERT_OUTPUT.of(expert)), np.linalg.norm(output, axis=1).mean())
    assert counted == 2 * mixture.hidden_states[..., 0].numel()


def test_gradients_at_an_expert_are_those_of_its_weights(mixture):
    """Of half the squared norm of the layer's output, whose gradients in the parameters are autograd's own."""
    moments = []
    for expert in range(EXPERTS):
        for output, given in ((GATE, FFN_INPUT), (UP, FFN_INPUT), (FFN_OUTPUT, NEURONS)):
            moments.append(Cross(output.gradient, given).moved(places_of_expert(expert)))
    statistics = mixture.statistics(moments)
    runner = LayerRunner(mixture.model, torch.device("cpu"), torch.float32, micro_batch=8)
    module = runner.build(mixture.layer, 0, torch.float32).requires_grad_()
    (runner.forward(module, 0, mixture.hidden_states).square().sum() / 2).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    state = mixture.model.names(0).state_of(mixture.layer)
    theirs = mixture.model.layer_from_state(0, state | gradients).ffn
    for expert in range(EXPERTS):
        own, network = statistics.moved(places_of_expert(expert)), theirs.expert(expert)
        for output, given, expected in (
            (GATE, FFN_INPUT, network.gate),
            (UP, FFN_INPUT, network.up),
            (FFN_OUTPUT, NEURONS, network.down),
        ):
            found = own.cross(output.gradient, given) * own.tokens(given)
            close(found, expected.weight.double().numpy())


@pytest.mark.parametrize("model_type", ["qwen2_moe", "deepseek_v3"])
def test_the_shared_network_is_seen_at_all_tokens(subject, model_type):
    this = subject(model_type, **MIXTURES[model_type])
    x = routed(this.model, this.layer, this.hidden_states).hidden_states
    statistics = this.statistics([Power(SHARED_NEURONS), Cross(UP.gradient, FFN_INPUT).moved(SHARED)])
    shared = this.ffn.shared
    neurons = torch.nn.functional.silu(x @ shared.gate.weight.T) * (x @ shared.up.weight.T)
    assert statistics.tokens(SHARED_NEURONS) == len(x)
    close(statistics.power(SHARED_NEURONS), neurons.double().square().mean(dim=0).numpy())
    runner = LayerRunner(this.model, torch.device("cpu"), torch.float32, micro_batch=8)
    module = runner.build(this.layer, 0, torch.float32).requires_grad_()
    (runner.forward(module, 0, this.hidden_states).square().sum() / 2).backward()
    network = getattr(module.mlp, "shared_expert" if model_type == "qwen2_moe" else "shared_experts")
    gradient = statistics.moved(SHARED).cross(UP.gradient, FFN_INPUT) * len(x)
    close(gradient, network.up_proj.weight.grad.double().numpy())


# ------------------------------------------------------------------ of one expert, as if of the layer's own network


def expert_statistics(activations: torch.Tensor, *moments) -> LayerStatistics:
    places = places_of_expert(3)
    statistics = LayerStatistics([moment.moved(places) for moment in moments])
    statistics.update({EXPERT_NEURONS.of(3): activations})
    return statistics.moved(places)


def test_an_expert_without_tokens_is_known_by_its_weights_alone():
    moments = Mean(NEURONS), Power(NEURONS), Peak(NEURONS), Gram(NEURONS)
    own = expert_statistics(torch.empty(0, 5), *moments)
    assert own.tokens(NEURONS) == 0
    assert torch.equal(own.mean(NEURONS), torch.zeros(5))
    assert torch.equal(own.rms(NEURONS), torch.ones(5)) and torch.equal(own.peak(NEURONS), torch.ones(5))
    assert torch.equal(own.gram(NEURONS), torch.eye(5))


@pytest.mark.parametrize("tokens", [1, 2, 1000])
def test_the_fewer_tokens_an_expert_saw_the_less_is_made_of_how_its_neurons_go_together(tokens):
    activations = torch.randn(tokens, 20, generator=torch.Generator().manual_seed(0))
    own = expert_statistics(activations, Gram(NEURONS), Power(NEURONS))
    gram = activations.T.double().numpy() @ activations.double().numpy() / tokens
    close(own.gram(NEURONS), gram + 0.01 * 20 / tokens * np.diag(gram).mean() * np.eye(20))
    close(own.power(NEURONS), np.diag(gram))
    assert torch.equal(own.gram(NEURONS), own.gram(NEURONS))
