"""Random decoder layers, their runs, and what is observed in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from distprune.backward import backward
from distprune.decoder_layer import DecoderLayer, layer_from_state
from distprune.forward import TAPS, LayerRunner
from distprune.modeling import PrunedConfig, PrunedDecoderLayer
from distprune.statistics import LayerStatistics, Moment, taps_of


@dataclass(frozen=True)
class Subject:
    """A random dense layer, and hidden states to run it on."""

    config: PrunedConfig
    layer: DecoderLayer
    hidden_states: Tensor

    def run(self, layer: DecoderLayer) -> Tensor:
        return self._runner.run(layer, 0, self.hidden_states)

    def statistics(self, moments: Sequence[Moment], layer: DecoderLayer | None = None) -> LayerStatistics:
        """Moments of the dense layer, or of another one; gradients are those of half its output's squared norm."""
        layer, statistics, taps = layer or self.layer, LayerStatistics(moments), taps_of(moments)
        if taps <= set(TAPS):
            self._runner.run(layer, 0, self.hidden_states, observe=statistics.update)
        else:
            output = self.run(layer).clone()
            backward(self._runner, layer, 0, self.hidden_states, output, observe=statistics.update, taps=taps)
        return statistics

    def observe(self, layer: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        """The same of another layer, as methods ask for it."""
        return self.statistics(moments, layer)

    def activations(self, layer: DecoderLayer | None = None) -> dict[str, Tensor]:
        """Every tap in float64, (tokens, width)."""
        batches: list[dict[str, Tensor]] = []
        self._runner.run(layer or self.layer, 0, self.hidden_states, observe=lambda taps: batches.append(dict(taps)))
        return {tap: torch.cat([batch[tap] for batch in batches]).double() for tap in batches[0]}

    @property
    def _runner(self) -> LayerRunner:
        return LayerRunner(self.config, torch.device("cpu"), torch.float32, micro_batch=3)


BIASES = {"attention_bias": True, "attention_output_bias": True, "mlp_bias": True}


@pytest.fixture(scope="session")
def subject() -> Callable[..., Subject]:
    """Builds a layer of hidden size 24 with heads of width 8, its norms and biases random too."""

    def build(*, query_heads: int = 4, kv_heads: int = 2, biases: bool = True, seed: int = 0, **changes) -> Subject:
        sizes = {"hidden_size": 24, "intermediate_size": 40, "head_dim": 8, "num_hidden_layers": 1, "vocab_size": 16}
        heads = {"num_attention_heads": query_heads, "num_key_value_heads": kv_heads}
        config = PrunedConfig(**sizes | heads | (BIASES if biases else {}) | changes)
        module = PrunedDecoderLayer(config, 0)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data = noise + 1 if "norm" in name else noise
        # Channels of different size: a scaling that is left out or taken from the wrong tap shows.
        scales = torch.logspace(-0.6, 0.6, 24)[torch.randperm(24, generator=generator)]
        module.input_layernorm.weight.data *= scales
        module.post_attention_layernorm.weight.data *= scales.flip(0)
        hidden_states = torch.randn(8, 16, 24, generator=generator)
        return Subject(config, layer_from_state(module.state_dict(), config.layer_shape(0)), hidden_states)

    return build


@pytest.fixture(params=[(4, 4), (4, 2), (6, 1)], ids=["one head a group", "two heads a group", "one group"])
def heads(request) -> dict[str, int]:
    return dict(zip(("query_heads", "kv_heads"), request.param, strict=True))


@pytest.fixture(params=[True, False], ids=["biases", "no biases"])
def any_subject(request, subject, heads) -> Subject:
    return subject(**heads, biases=request.param)
