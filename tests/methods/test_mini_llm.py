"""MINI-LLM's scores, against PyTorch's own gradients and activations of the whole model."""

from __future__ import annotations

import pytest
import torch
from gradients import with_gradients
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from distprune.layers.architecture import Architecture
from distprune.layers.loss import LossHead
from distprune.layers.runner import LayerRunner
from distprune.methods.even_layers import with_heads
from distprune.methods.llm_pruner import LLMPruner
from distprune.methods.mini_llm import MiniLLM
from distprune.methods.units import heads_of_groups, keep_heads, keep_neurons
from distprune.statistics import LayerStatistics, sites_of

KV_HEADS = 2
ROWS, COLUMNS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "head_dim": 8}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=KV_HEADS, initializer_range=0.2)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(40, (6, 10), generator=torch.Generator().manual_seed(1))


def scores_by_hooks(model: nn.Module, tokens: Tensor) -> list[dict[str, Tensor]]:
    """|w|·rms(x)·|∂L/∂w| of every weight of every layer, by ``loss.backward()`` and by hooks that see the inputs."""
    inputs: dict[nn.Module, Tensor] = {}
    linears = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
    keep = lambda module, args: inputs.update({module: args[0].detach().double().flatten(0, 1)})  # noqa: E731
    handles = [linear.register_forward_pre_hook(keep) for linear in linears]
    model.zero_grad()
    count = tokens[:, 1:].numel()
    (model(tokens, labels=tokens).loss * count).backward()
    for handle in handles:
        handle.remove()

    def score(linear: nn.Linear) -> Tensor:
        weight, x = linear.weight, inputs[linear]
        return weight.detach().double().abs() * x.square().mean(dim=0).sqrt() * weight.grad.double().abs()

    return [
        {name.split(".")[-1]: score(linear) for name, linear in layer.named_modules() if isinstance(linear, nn.Linear)}
        for layer in model.model.layers
    ]


def units_by_weights(scores: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The scores of KV groups and of neurons: one number a row or a column, added up."""
    channels = {name: scores[name].sum(dim=1) for name in ROWS} | {name: scores[name].sum(dim=0) for name in COLUMNS}
    groups = sum(channels[name].view(KV_HEADS, -1).sum(dim=1) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))
    return groups, channels["gate_proj"] + channels["up_proj"] + channels["down_proj"]


def profiles_by_layers(method: MiniLLM | LLMPruner, model: nn.Module, tokens: Tensor) -> list[dict[str, Tensor]]:
    """What the method remembers of every layer, which gets its gradient from the layer behind it."""
    architecture = Architecture(model.config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    runner = LayerRunner(architecture, torch.device("cpu"), torch.float32, micro_batch=4)
    outer = {name: state[name] for name in (*architecture.outer_tensors(), architecture.head_name)}
    runner.shell.fill(outer, runner.gradient_dtype)
    layers, states = [], [state[architecture.embedding_name][tokens]]
    for index in range(architecture.num_layers):
        prefix = architecture.layer_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        layers.append(architecture.layer_from_state(index, own))
        states.append(runner.run(layers[-1], index, states[-1]))
    gradient, _ = LossHead(runner).gradient(states[-1], tokens)
    profiles = []
    for index in reversed(range(len(layers))):
        moments = method.gradient_moments(layers[index].shape)
        statistics = LayerStatistics(moments)
        gradient = runner.backward(
            layers[index], index, states[index], gradient, observe=statistics.update, sites=sites_of(moments)
        )
        profiles.insert(0, dict(method.profile(layers[index], statistics)))
    return profiles


def test_a_unit_is_worth_what_the_whole_models_gradients_and_inputs_say(model, tokens):
    profiles = profiles_by_layers(MiniLLM(), model, tokens)
    for profile, scores in zip(profiles, scores_by_hooks(model, tokens), strict=True):
        groups, neurons = units_by_weights(scores)
        torch.testing.assert_close(profile["groups"].double(), groups, rtol=1e-3, atol=1e-6)
        torch.testing.assert_close(profile["neurons"].double(), neurons, rtol=1e-3, atol=1e-6)


def test_the_norms_of_the_inputs_tell_it_from_llm_pruner(model, tokens):
    ours, theirs = (profiles_by_layers(method, model, tokens) for method in (MiniLLM(), LLMPruner()))
    assert any(
        not torch.equal(own["neurons"].argsort(), other["neurons"].argsort())
        for own, other in zip(ours, theirs, strict=True)
    )


def test_neurons_without_a_gate_are_worth_what_their_two_vectors_are(gateless):
    module, seen = with_gradients(gateless), {}
    up, down = (child for child in module.mlp.children() if isinstance(child, nn.Linear))
    for linear in (up, down):
        linear.register_forward_pre_hook(lambda linear, args: seen.update({linear: args[0].detach().flatten(0, 1)}))
    profile, runner = gateless.profile(MiniLLM()), LayerRunner(gateless.model, torch.device("cpu"), torch.float32, 8)
    runner.forward(module, 0, gateless.hidden_states)
    score = lambda linear: (linear.weight * linear.weight.grad).abs() * seen[linear].square().mean(dim=0).sqrt()  # noqa: E731
    expected = score(up).sum(dim=1) + score(down).sum(dim=0)
    torch.testing.assert_close(profile["neurons"], expected.detach(), rtol=1e-3, atol=1e-4)


def test_the_best_units_stay_and_stay_as_they_are(any_subject):
    attention, method = any_subject.attention, MiniLLM()
    profile = any_subject.profile(method)
    left, heads_each = max(1, attention.kv_heads - 1), attention.query_heads // attention.kv_heads
    best = lambda scores, keep: scores.argsort()[len(scores) - keep :].sort().values  # noqa: E731
    heads = heads_of_groups(best(profile["groups"], left), heads_each)
    ffn = keep_neurons(any_subject.ffn, best(profile["neurons"], 24))
    planned = with_heads(any_subject.layer.shape, left, heads_each).with_ffn(width=24)
    assert method.pruning_moments(any_subject.layer.shape, planned) == ()
    expected = any_subject.run_with(attention=keep_heads(attention, heads), ffn=ffn)
    assert torch.equal(any_subject.run(any_subject.prune(method, planned)), expected)
