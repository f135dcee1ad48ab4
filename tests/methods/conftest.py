"""Random decoder layers, their runs, and what is observed in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from tiny_architectures import BIASES, tiny
from torch import Tensor

from distprune.layers.architecture import Architecture
from distprune.layers.parts import Attention, DecoderLayer, FeedForward
from distprune.layers.runner import LayerRunner
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import Site
from distprune.methods import LayerToPrune, Method, Profile
from distprune.statistics import LayerStatistics, Moment, site_widths, sites_of


@dataclass(frozen=True)
class Subject:
    """A random dense layer, and hidden states to run it on."""

    model: Architecture
    layer: DecoderLayer
    hidden_states: Tensor

    @property
    def attention(self) -> Attention:
        return self.layer.attention

    @property
    def ffn(self) -> FeedForward:
        return self.layer.ffn

    def changed(self, **parts: Attention | FeedForward) -> Subject:
        """With other parts in the layer."""
        return replace(self, layer=replace(self.layer, **parts))

    def run(self, layer: DecoderLayer) -> Tensor:
        return self._runner.run(layer, 0, self.hidden_states)

    def run_with(self, **parts: Attention | FeedForward | None) -> Tensor:
        """Of the layer with other parts."""
        return self.run(replace(self.layer, **parts))

    def statistics(self, moments: Sequence[Moment], layer: DecoderLayer | None = None) -> LayerStatistics:
        """Moments of the dense layer, or of another one; gradients are those of half its output's squared norm."""
        statistics = LayerStatistics(moments)
        self._observe(layer or self.layer, statistics.update, sites_of(moments))
        return statistics

    def observe(self, layer: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        """The same of another layer, as methods ask for it."""
        return self.statistics(moments, layer)

    def activations(self, layer: DecoderLayer | None = None, *, gradients: bool = False) -> dict[Site, Tensor]:
        """What is seen at every site in float64, (tokens, width)."""
        layer = layer or self.layer
        sites = {site for site in site_widths(24, layer.shape) if gradients or not site.is_gradient}
        batches: list[dict[Site, Tensor]] = []
        self._observe(layer, lambda seen: batches.append(dict(seen)), sites)
        return {site: torch.cat([batch[site] for batch in batches]).double() for site in batches[0]}

    def _observe(self, layer: DecoderLayer, observe, sites: set[Site]) -> None:
        if any(site.is_gradient for site in sites):
            output = self.run(layer).clone()
            self._runner.backward(layer, 0, self.hidden_states, output, observe=observe, sites=sites)
        else:
            self._runner.run(layer, 0, self.hidden_states, observe=observe, sites=sites)

    def profile(self, method: Method, layer: DecoderLayer | None = None) -> Profile:
        """What the method remembers of the layer."""
        layer = layer or self.layer
        moments = [*method.dense_moments(layer.shape), *method.gradient_moments(layer.shape)]
        return method.profile(layer, self.statistics(moments, layer))

    def prune(
        self,
        method: Method,
        planned: LayerShape,
        profile: Profile | None = None,
        layer: DecoderLayer | None = None,
        *,
        sparsity: float = 0.3,
    ) -> DecoderLayer:
        """The layer as the method prunes it, of which it is seen that it has the planned shape."""
        layer = layer or self.layer
        profile = self.profile(method, layer) if profile is None else profile
        statistics = self.statistics(method.pruning_moments(layer.shape, planned), layer)
        pruned = method.prune(LayerToPrune(0, layer, planned, statistics, profile, self.observe, sparsity))
        assert pruned.shape == planned
        return pruned

    @property
    def _runner(self) -> LayerRunner:
        return LayerRunner(self.model, torch.device("cpu"), torch.float32, micro_batch=3)


@pytest.fixture(scope="session")
def subject() -> Callable[..., Subject]:
    """Builds a layer of hidden size 24 with heads of width 8, its norms and biases random too."""

    def build(
        model_type: str = "llama",
        *,
        query_heads: int = 4,
        kv_heads: int = 2,
        width: int = 40,
        layers: int = 1,
        biases: bool = True,
        seed: int = 0,
        **changes,
    ) -> Subject:
        sizes = {"intermediate_size": width, "num_hidden_layers": layers, "vocab_size": 16}
        heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
        model = tiny(model_type, **sizes | heads | (BIASES if biases and model_type == "llama" else {}) | changes)
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name, dims in model.layer_tensors(0, model.dense_shape(0)).items():
            noise = torch.randn(dims, generator=generator) * 0.2
            state[name] = noise + 1 if "norm" in name and name.endswith("weight") else noise
        # Channels of different size: a scaling that is left out or taken from the wrong site shows.
        scales = torch.logspace(-0.6, 0.6, model.hidden_size)
        scales = scales[torch.randperm(model.hidden_size, generator=generator)]
        state["input_layernorm.weight"] *= scales
        if "post_attention_layernorm.weight" in state:
            state["post_attention_layernorm.weight"] *= scales.flip(0)
        hidden_states = torch.randn(8, 16, model.hidden_size, generator=generator)
        return Subject(model, model.layer_from_state(0, state), hidden_states)

    return build


@pytest.fixture(params=[(4, 4), (4, 2), (6, 1)], ids=["one head a group", "two heads a group", "one group"])
def heads(request) -> dict[str, int]:
    return dict(zip(("query_heads", "kv_heads"), request.param, strict=True))


@pytest.fixture(params=[True, False], ids=["biases", "no biases"])
def any_subject(request, subject, heads) -> Subject:
    return subject(**heads, biases=request.param)


@pytest.fixture(params=["nemotron", "starcoder2"], ids=["no biases", "biases"])
def gateless(request, subject) -> Subject:
    """A layer whose feed-forward network has no gate."""
    this = subject(request.param, **{"use_bias": True} if request.param == "starcoder2" else {})
    assert this.ffn.gate is None
    return this
