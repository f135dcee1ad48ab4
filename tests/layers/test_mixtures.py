"""What is seen of a mixture's experts, against a loop over tokens and experts; what a mixture takes of memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tiny_families import CHOSEN, HIDDEN, MIXTURES, tiny_model
from torch import Tensor, nn
from transformers.activations import ACT2FN

from distprune.layers.architecture import Architecture
from distprune.layers.module import build_module
from distprune.layers.parts import DecoderLayer, Experts, FeedForward
from distprune.layers.runner import LayerRunner
from distprune.layers.sites import (
    EXPERT_NEURONS,
    EXPERT_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    ROUTER_WEIGHT,
    SHARED_NEURONS,
    Site,
)

INDEX = 3  # the last layer, which is a mixture in every family
ANY_MIXTURE = pytest.mark.parametrize("model_type", MIXTURES)
OF_EXPERTS = (EXPERT_NEURONS, EXPERT_OUTPUT, ROUTER_WEIGHT)
SAMPLES, LENGTH = 2, 15


class Subject:
    """The last layer of a tiny model, and hidden states at its input."""

    def __init__(self, model_type: str, dtype: torch.dtype = torch.float32):
        self.model = tiny_model(model_type, dtype)
        self.architecture = Architecture(self.model.config)
        self.runner = LayerRunner(self.architecture, torch.device("cpu"), dtype, micro_batch=SAMPLES)
        prefix = self.architecture.layer_prefix(INDEX)
        state = self.model.state_dict()
        self.state = {name.removeprefix(prefix): each for name, each in state.items() if name.startswith(prefix)}
        self.layer: DecoderLayer = self.architecture.layer_from_state(INDEX, self.state)
        self.states = torch.randn(SAMPLES, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(1)).to(dtype)

    @property
    def experts(self) -> Experts:
        assert isinstance(self.layer.ffn, Experts)
        return self.layer.ffn

    def seen(self, *sites: Site) -> dict[Site, Tensor]:
        found: dict[Site, Tensor] = {}
        self.runner.run(self.layer, INDEX, self.states, observe=found.update, sites=sites)
        return found


@dataclass
class Routed:
    """What transformers' own modules were called with, and gave."""

    given: Tensor  # (tokens, d)
    chosen: Tensor  # (tokens, k)
    weights: Tensor  # (tokens, k)
    shared: Tensor  # (tokens, d), what the shared network adds to the mixture's output


def routed(subject: Subject) -> Routed:
    mixture: nn.Module = subject.model.get_submodule(
        f"{subject.architecture.layers_path}.{INDEX}.{subject.architecture.family.ffn}"
    )
    calls: dict[str, Tensor] = {}

    def experts_called(_, given, named) -> None:
        calls["given"], calls["chosen"], calls["weights"] = (*given, *named.values())

    def shared_called(_, given, output) -> None:
        gate = getattr(mixture, "shared_expert_gate", None)
        calls["shared"] = (output if gate is None else torch.sigmoid(gate(given[0])) * output).flatten(0, -2)

    mixture.experts.register_forward_pre_hook(experts_called, with_kwargs=True)
    if subject.experts.shared is not None:
        mixture.get_submodule(subject.architecture.names(INDEX).experts.shared).register_forward_hook(shared_called)
    with torch.no_grad():
        layer = subject.model.get_submodule(subject.architecture.layers_path)[INDEX]
        call = subject.runner.shell.calls(SAMPLES, LENGTH, subject.states.dtype)[INDEX]
        layer(subject.states, *call.arguments, **call.keywords)
    return Routed(**{"shared": torch.zeros_like(calls["given"])} | calls)


def neurons_of(subject: Subject, expert: FeedForward, given: Tensor) -> Tensor:
    """Of one token: given (d,) to (f,)."""
    assert expert.gate is not None
    gate, up = (F.linear(given, each.weight, each.bias) for each in (expert.gate, expert.up))
    config = subject.model.config
    if config.model_type == "gpt_oss":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return ACT2FN[config.hidden_act](gate) * up


def in_order(activations: dict[Site, Tensor]) -> dict[Site, Tensor]:
    """An expert's tokens in an order of their own, the same at all of its sites: the module's is none in particular."""
    order = activations[EXPERT_OUTPUT][:, 0].argsort()
    return {site: activation[order] for site, activation in activations.items()}


@ANY_MIXTURE
def test_what_passes_through_each_expert_is_what_a_loop_finds(model_type):
    subject = Subject(model_type)
    experts, count = subject.experts, subject.experts.shape.count
    seen = subject.seen(*(site.of(number) for number in range(count) for site in OF_EXPERTS), FFN_INPUT, FFN_OUTPUT)
    call = routed(subject)
    torch.testing.assert_close(seen[FFN_INPUT], call.given)
    total = call.shared.clone()
    for number in range(count):
        expert, expected = experts.expert(number), {site: [] for site in OF_EXPERTS}
        for token, place in (call.chosen == number).nonzero().tolist():
            weight = call.weights[token, place]
            neurons = neurons_of(subject, expert, call.given[token])
            output = weight * F.linear(neurons, expert.down.weight, expert.down.bias)
            total[token] += output
            for site, activation in zip(OF_EXPERTS, (weight * neurons, output, weight[None]), strict=True):
                expected[site].append(activation)
        found = {site: seen[site.of(number)] for site in OF_EXPERTS}
        wanted = {site: torch.stack(rows) if rows else found[site][:0] for site, rows in expected.items()}
        for site in OF_EXPERTS:
            torch.testing.assert_close(in_order(found)[site], in_order(wanted)[site], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen[FFN_OUTPUT], total, rtol=1e-4, atol=1e-5)
    routed_tokens = [len(seen[ROUTER_WEIGHT.of(number)]) for number in range(count)]
    assert sum(routed_tokens) == CHOSEN * SAMPLES * LENGTH and len(set(routed_tokens)) > 1


@ANY_MIXTURE
def test_the_shared_networks_neurons_are_those_of_every_token(model_type):
    subject = Subject(model_type)
    seen, shared = subject.seen(SHARED_NEURONS, FFN_INPUT), subject.experts.shared
    if shared is None:
        assert SHARED_NEURONS not in seen
        return
    torch.testing.assert_close(seen[SHARED_NEURONS], neurons_of(subject, shared, seen[FFN_INPUT]), rtol=1e-4, atol=1e-5)


@ANY_MIXTURE
def test_observing_changes_nothing(model_type):
    subject = Subject(model_type, torch.bfloat16)
    plain = subject.runner.run(subject.layer, INDEX, subject.states)
    sites = [site.of(number) for number in range(subject.experts.shape.count) for site in OF_EXPERTS]
    watched = subject.runner.run(subject.layer, INDEX, subject.states, observe=lambda _: None, sites=sites)
    assert torch.equal(plain, watched)


# ---------------------------------------------------------------- memory


@ANY_MIXTURE
def test_a_mixture_is_seen_as_a_part_without_a_copy(model_type):
    """Of all its tensors: on the way into the part, back, and into the module that runs."""
    subject = Subject(model_type)
    names, family = subject.architecture.names(INDEX), subject.architecture.family
    module = build_module(subject.architecture, INDEX, subject.layer, torch.float32)
    for state in (names.state_of(subject.layer), module.state_dict()):
        assert state.keys() == subject.state.keys()
        for name, tensor in subject.state.items():
            if name.startswith(f"{family.ffn}."):
                assert state[name].data_ptr() == tensor.data_ptr(), name


@ANY_MIXTURE
def test_an_expert_is_a_view(model_type):
    experts = Subject(model_type).experts
    inputs, down = experts.inputs.untyped_storage(), experts.down.untyped_storage()
    expert = experts.expert(1)
    assert {each.weight.untyped_storage().data_ptr() for each in expert.inputs} == {inputs.data_ptr()}
    assert expert.down.weight.untyped_storage().data_ptr() == down.data_ptr()
