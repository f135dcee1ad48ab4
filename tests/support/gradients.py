"""Gradients of a whole model two ways: by transformers' own forward and backward pass, and layer by layer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from distprune.backward import ALL_TAPS, backward
from distprune.families import family_of
from distprune.forward import LayerRunner
from distprune.loss import LossHead
from distprune.statistics import Cross, LayerStatistics

# What is tapped at the outputs of these modules of a stock decoder layer.
GRADIENTS = {
    "query_gradient": "self_attn.q_proj",
    "key_gradient": "self_attn.k_proj",
    "value_gradient": "self_attn.v_proj",
    "attention_output_gradient": "self_attn.o_proj",
    "gate_gradient": "mlp.gate_proj",
    "up_gradient": "mlp.up_proj",
    "ffn_output_gradient": "mlp.down_proj",
}
# A weight's gradient is a moment of the gradient at its output and of its input.
INPUTS = {
    "self_attn.q_proj": "attention_input",
    "self_attn.k_proj": "attention_input",
    "self_attn.v_proj": "attention_input",
    "self_attn.o_proj": "attention_values",
    "mlp.gate_proj": "ffn_input",
    "mlp.up_proj": "ffn_input",
    "mlp.down_proj": "ffn_neurons",
}


@dataclass
class Gradients:
    """Of every layer: the gradient at its input, (samples, length, d), at taps, (tokens, width), and of weights."""

    losses: Tensor
    inputs: dict[int, Tensor] = field(default_factory=dict)
    taps: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)


def by_transformers(model: PreTrainedModel, tokens: Tensor) -> Gradients:
    """By ``loss.backward()``."""
    seen: dict[tuple[int, str], Tensor] = {}

    def watch(index: int, name: str, tensor: Tensor) -> None:
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
        result.taps[index] = {tap: seen[index, tap].grad.flatten(0, 1) for tap in GRADIENTS}
        result.weights[index] = {name: layer.get_submodule(name).weight.grad.clone() for name in INPUTS}
    model.zero_grad()
    return result


def layer_by_layer(model: PreTrainedModel, tokens: Tensor, micro_batch: int, dtype=torch.float32) -> Gradients:
    """By the chain that is under test."""
    family = family_of(model.config)
    dense, state = (
        family.dense_config(model.config),
        {name: tensor.detach() for name, tensor in model.state_dict().items()},
    )
    runner = LayerRunner(dense, torch.device("cpu"), dtype, micro_batch)
    layers = [
        family.layer_from_checkpoint({name: state[name] for name in family.layer_shapes(dense, index)}, dense, index)
        for index in range(dense.num_hidden_layers)
    ]
    states = [state[family.embedding][tokens].to(dtype)]
    for index, layer in enumerate(layers):
        states.append(runner.run(layer, index, states[-1]))
    head = LossHead(state[family.final_norm], state[family.head_of(dense)], runner)
    gradient, losses = head.gradient(states[-1], tokens)
    result = Gradients(losses)
    for index in reversed(range(len(layers))):
        batches: list[dict[str, Tensor]] = []
        moments = {name: Cross(tap, INPUTS[name]) for tap, name in GRADIENTS.items()}
        statistics = LayerStatistics(moments.values())

        def observe(activations, batches=batches, statistics=statistics):
            statistics.update(activations)
            batches.append(activations)

        gradient = backward(runner, layers[index], index, states[index], gradient, observe=observe, taps=ALL_TAPS)
        result.inputs[index] = gradient
        result.taps[index] = {tap: torch.cat([batch[tap] for batch in batches]) for tap in ALL_TAPS}
        result.weights[index] = {
            name: statistics.tokens * statistics.cross(moment.tap, moment.other) for name, moment in moments.items()
        }
    return result


def assert_same(found: Gradients, expected: Gradients, tolerance: float) -> None:
    """Every number within ``tolerance`` of the largest of its tensor."""
    torch.testing.assert_close(found.losses.float(), expected.losses.float(), rtol=tolerance, atol=0)
    for index, given in expected.inputs.items():
        pairs = {"input": (found.inputs[index], given)}
        pairs |= {tap: (found.taps[index][tap], tensor) for tap, tensor in expected.taps[index].items()}
        pairs |= {name: (found.weights[index][name], tensor) for name, tensor in expected.weights[index].items()}
        for name, (actual, wanted) in pairs.items():
            assert actual.shape == wanted.shape, (index, name)
            error = (actual - wanted).abs().max() / wanted.abs().max()
            assert error < tolerance, (index, name, error)
