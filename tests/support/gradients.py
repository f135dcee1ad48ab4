"""Gradients of a whole model two ways: by transformers' own forward and backward pass, and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from distprune.layers.architecture import Architecture
from distprune.layers.loss import LossHead
from distprune.layers.runner import LayerRunner
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    GATE,
    KEYS,
    NEURONS,
    QUERIES,
    UP,
    VALUES,
    Site,
)
from distprune.statistics import Cross, LayerStatistics, sites_of

# What is taken at the outputs of these modules of a stock decoder layer.
GRADIENTS = {
    QUERIES.gradient: "self_attn.q_proj",
    KEYS.gradient: "self_attn.k_proj",
    VALUES.gradient: "self_attn.v_proj",
    ATTENTION_OUTPUT.gradient: "self_attn.o_proj",
    GATE.gradient: "mlp.gate_proj",
    UP.gradient: "mlp.up_proj",
    FFN_OUTPUT.gradient: "mlp.down_proj",
}
# A weight's gradient is a moment of the gradient at its output and of its input.
INPUTS = {
    "self_attn.q_proj": ATTENTION_INPUT,
    "self_attn.k_proj": ATTENTION_INPUT,
    "self_attn.v_proj": ATTENTION_INPUT,
    "self_attn.o_proj": ATTENDED,
    "mlp.gate_proj": FFN_INPUT,
    "mlp.up_proj": FFN_INPUT,
    "mlp.down_proj": NEURONS,
}


@dataclass
class Gradients:
    """Of every layer: the gradient at its input, (samples, length, d), at sites, (tokens, width), and of weights."""

    losses: Tensor
    inputs: dict[int, Tensor] = field(default_factory=dict)
    sites: dict[int, dict[Site, Tensor]] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def by_transformers(model: PreTrainedModel, tokens: Tensor) -> Gradients:
    """By ``loss.backward()``."""
    seen: dict[tuple[int, str | Site], Tensor] = {}

    def watch(index: int, name: str | Site, tensor: Tensor) -> None:
        tensor.retain_grad()
        seen[index, name] = tensor

    handles = []
    for index, layer in enumerate(model.model.layers):
        handles.append(layer.register_forward_pre_hook(lambda _, args, i=index: watch(i, "input", args[0])))
        for tap, name in GRADIENTS.items():
            keep = lambda _, __, output, i=index, tap=tap: watch(i, tap, output)  # noqa: E731
            handles.append(layer.get_submodule(name).register_forward_hook(keep))
    model.requires_grad_(True).zero_grad()
    logits = model(tokens).logits[:, :-1]
    losses = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
    losses.sum().backward()
    for handle in handles:
        handle.remove()
    result = Gradients(losses.detach().unflatten(0, (len(tokens), -1)).sum(dim=1))
    for index, layer in enumerate(model.model.layers):
        result.inputs[index] = seen[index, "input"].grad
        result.sites[index] = {tap: seen[index, tap].grad.flatten(0, 1) for tap in GRADIENTS}
        result.weights[index] = {name: layer.get_submodule(name).weight.grad.clone() for name in INPUTS}
    model.zero_grad()
    return result


def layer_by_layer(model: PreTrainedModel, tokens: Tensor, micro_batch: int, dtype=torch.float32) -> Gradients:
    """By the chain that is under test."""
    architecture = Architecture(model.config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    runner = LayerRunner(architecture, torch.device("cpu"), dtype, micro_batch)
    outer = {name: state[name] for name in (*architecture.outer_tensors(), architecture.head_name)}
    runner.shell.fill(outer, runner.gradient_dtype)
    layers = []
    for index in range(architecture.num_layers):
        prefix = architecture.layer_prefix(index)
        own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        layers.append(architecture.layer_from_state(index, own))
    states = [state[architecture.embedding_name][tokens].to(dtype)]
    for index, layer in enumerate(layers):
        states.append(runner.run(layer, index, states[-1]))
    gradient, losses = LossHead(runner).gradient(states[-1], tokens)
    result = Gradients(losses)
    for index in reversed(range(len(layers))):
        batches: list[dict[Site, Tensor]] = []
        moments = {name: Cross(site, INPUTS[name]) for site, name in GRADIENTS.items()}
        statistics = LayerStatistics(moments.values())

        def observe(activations, batches=batches, statistics=statistics):
            statistics.update(activations)
            batches.append({site: activations[site] for site in GRADIENTS})

        sites = sites_of(moments.values())
        gradient = runner.backward(layers[index], index, states[index], gradient, observe=observe, sites=sites)
        result.inputs[index] = gradient
        result.sites[index] = {site: torch.cat([batch[site] for batch in batches]) for site in GRADIENTS}
        result.weights[index] = {
            name: statistics.tokens(moment.site) * statistics.cross(moment.site, moment.other)
            for name, moment in moments.items()
        }
    return result


def assert_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """Every number within ``tolerance`` of the largest of its tensor."""
    torch.testing.assert_close(found.losses.float(), expected.losses.float(), rtol=tolerance, atol=0)
    for index, given in expected.inputs.items():
        pairs = {"input": (found.inputs[index], given)}
        pairs |= {tap: (found.sites[index][tap], tensor) for tap, tensor in expected.sites[index].items()}
        pairs |= {name: (found.weights[index][name], tensor) for name, tensor in expected.weights[index].items()}
        for name, (actual, wanted) in pairs.items():
            assert actual.shape == wanted.shape, (index, name)
            error = (actual - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (index, name, error)


def with_gradients(this) -> nn.Module:
    """A module of a subject's layer that holds the gradients of half its output's squared norm."""
    runner = LayerRunner(this.model, torch.device("cpu"), torch.float32, 3)
    module = runner.build(this.layer, 0, torch.float32)
    for parameter in module.parameters():
        parameter.requires_grad_()
    (runner.forward(module, 0, this.hidden_states).square().sum() / 2).backward()
    return module
