"""A model run one layer at a time, forward and backward, against transformers' own class run whole."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_families import CARRIED, FAMILIES, MIXTURES, VOCABULARY, tiny_model
from torch import Tensor

from distprune.layers.architecture import Architecture
from distprune.layers.loss import LossHead
from distprune.layers.parts import DecoderLayer, Experts, FeedForward
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
    SITES,
    UP,
    VALUES,
)

ANY_FAMILY = pytest.mark.parametrize("model_type", [*FAMILIES, *MIXTURES, *CARRIED])
#: Of the sites, those that a mixture of experts has.
OF_ALL_FFNS = {FFN_INPUT, FFN_OUTPUT}
TOKENS = torch.randint(3, VOCABULARY, (3, 40), generator=torch.Generator().manual_seed(1))


class Layers:
    """A whole model, and the same in layers."""

    def __init__(self, model_type: str, dtype: torch.dtype, **changes):
        self.model = tiny_model(model_type, dtype, **changes)
        self.architecture = Architecture(self.model.config)
        self.runner = LayerRunner(self.architecture, torch.device("cpu"), dtype, micro_batch=2)
        self.state = self.model.state_dict()
        self.runner.shell.fill({name: self.state[name] for name in self.architecture.outer_tensors()})
        self.layers = [self.layer(index) for index in range(self.architecture.num_layers)]

    def layer(self, index: int) -> DecoderLayer:
        prefix = self.architecture.layer_prefix(index)
        state = {name.removeprefix(prefix): tensor for name, tensor in self.state.items() if name.startswith(prefix)}
        return self.architecture.layer_from_state(index, state)

    def embed(self) -> Tensor:
        ids, places = TOKENS.unique(return_inverse=True)
        return self.runner.shell.embed(self.state[self.architecture.embedding_name][ids], places)

    def hidden_states(self) -> list[Tensor]:
        """At the input of every layer, and at the last one's output."""
        states = [self.embed()]
        for index, layer in enumerate(self.layers):
            states.append(self.runner.run(layer, index, states[-1]))
        if self.architecture.is_tied:
            head = {self.architecture.head_name: self.state[self.architecture.embedding_name]}
            self.runner.shell.fill(head)
        return states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@ANY_FAMILY
def test_logits_are_the_same_bits(model_type, dtype):
    layers = Layers(model_type, dtype)
    states = layers.hidden_states()
    # In the micro-batches of the runner, since products of other shapes may round otherwise.
    with torch.no_grad():
        expected = torch.cat([layers.model(batch, use_cache=False).logits for batch in TOKENS.split(2)])
        logits = torch.stack([layers.runner.shell.logits(sample) for sample in states[-1]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@ANY_FAMILY
def test_gradients_are_those_of_the_whole_model(model_type):
    layers = Layers(model_type, torch.float32)
    states = layers.hidden_states()
    gradient, losses = LossHead(layers.runner).gradient(states[-1], TOKENS)

    loss, expected = by_transformers(layers)
    torch.testing.assert_close(losses.sum().item(), loss, rtol=1e-5, atol=0)
    for index in reversed(range(layers.architecture.num_layers)):
        gradient = layers.runner.backward(layers.layers[index], index, states[index], gradient)
        torch.testing.assert_close(gradient, expected[index], rtol=0, atol=0)


def by_transformers(layers: Layers) -> tuple[float, list[Tensor]]:
    """The loss and its gradients at the inputs of layers, in the micro-batches of the runner."""
    inputs: list[list[Tensor]] = [[] for _ in layers.layers]

    def keep(index: int, given: Tensor) -> None:
        given.retain_grad()
        inputs[index].append(given)

    for index, layer in enumerate(layers.model.get_submodule(layers.architecture.layers_path)):
        layer.register_forward_pre_hook(lambda _, given, index=index: keep(index, given[0]))
    loss = 0.0
    for batch in TOKENS.split(2):
        logits = layers.model(batch, use_cache=False).logits
        of_batch = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="sum")
        of_batch.backward()
        loss += of_batch.item()
    return loss, [torch.cat([given.grad for given in of_layer]) for of_layer in inputs]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("groups", [1, 2, 8])
def test_head_counts_and_tied_heads(groups, tied):
    layers = Layers("llama", torch.float32, num_key_value_heads=groups, tie_word_embeddings=tied)
    states = layers.hidden_states()
    with torch.no_grad():
        expected = torch.cat([layers.model(batch, use_cache=False).logits for batch in TOKENS.split(2)])
        logits = torch.stack([layers.runner.shell.logits(sample) for sample in states[-1]])
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@ANY_FAMILY
def test_every_site_of_a_part_is_seen(model_type):
    layers = Layers(model_type, torch.float32)
    gated = {site for site in SITES if site.place == "gate"}
    for index, layer in enumerate(layers.layers):
        expected = set(SITES) if layer.ffn is None or layer.shape.ffn.is_gated else set(SITES) - gated
        if layer.ffn is None:
            expected = {site for site in expected if site.part == "attention"}
        if isinstance(layer.ffn, Experts):
            expected = {site for site in expected if site.part != "ffn" or site in OF_ALL_FFNS}
        if layer.attention is None:
            expected = {site for site in expected if site.part == "ffn"}
        seen: dict = {}
        layers.runner.run(layer, index, layers.embed()[:1], observe=seen.update, sites=SITES)
        assert set(seen) == expected
        assert all(activation.shape[0] == TOKENS.shape[1] for activation in seen.values())


@ANY_FAMILY
def test_sites_are_where_they_are_said_to_be(model_type):
    """Each projection's output is that of its input, by its part's own weights."""
    layers = Layers(model_type, torch.float32)
    for index, layer in enumerate(layers.layers):
        seen: dict = {}
        layers.runner.run(layer, index, layers.embed()[:1], observe=seen.update, sites=SITES)
        maps = []
        if (attention := layer.attention) is not None:
            maps += [
                (ATTENTION_INPUT, attention.query, QUERIES),
                (ATTENTION_INPUT, attention.key, KEYS),
                (ATTENTION_INPUT, attention.value, VALUES),
                (ATTENDED, attention.output, ATTENTION_OUTPUT),
            ]
        if isinstance(ffn := layer.ffn, FeedForward):
            maps += [(FFN_INPUT, ffn.up, UP), (NEURONS, ffn.down, FFN_OUTPUT)]
            maps += [(FFN_INPUT, ffn.gate, GATE)] if ffn.gate is not None else []
        for given, linear, output in maps:
            expected = F.linear(seen[given], linear.weight, linear.bias)
            torch.testing.assert_close(seen[output], expected, rtol=1e-4, atol=1e-5)
