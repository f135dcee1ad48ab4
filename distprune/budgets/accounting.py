"""Counting the parameters that decoder layers hold, and how many a sparsity asks to remove."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from distprune.modeling import ROTARY_PAIRS, LayerShape, PrunedConfig, layer_tensor_shapes


def layer_parameters(config: PrunedConfig, index: int, shape: LayerShape) -> int:
    """Parameters of layer ``index`` if it had ``shape``, norms and biases included."""
    tensors = layer_tensor_shapes(config, index, shape)
    return sum(math.prod(size) for name, size in tensors.items() if name != ROTARY_PAIRS)


def decoder_parameters(config: PrunedConfig, shapes: Sequence[LayerShape]) -> int:
    """Parameters of all decoder layers if they had ``shapes``."""
    return sum(layer_parameters(config, index, shape) for index, shape in enumerate(shapes))


def affordable_neurons(config: PrunedConfig, index: int, shape: LayerShape, budget: float) -> float:
    """How wide layer ``index`` of ``shape`` may make its FFN if it may hold ``budget`` parameters."""
    one, two = (layer_parameters(config, index, replace(shape, ffn_width=width)) for width in (1, 2))
    return 1 + (budget - one) / (two - one)


def outer_parameters(config: PrunedConfig) -> int:
    """Parameters outside the decoder layers: embeddings, final norm and an untied head."""
    tables = 1 if config.tie_word_embeddings else 2
    return tables * config.vocab_size * config.hidden_size + config.hidden_size


@dataclass(frozen=True)
class ParameterTarget:
    """How many decoder parameters may remain.

    Args:
        config: the dense model.
        sparsity: the fraction to remove, in [0, 1).
        count_embeddings: whether the fraction is of all parameters (embeddings, final norm and head included) or of
            the decoder layers alone. What is removed comes from the decoder layers either way.
    """

    config: PrunedConfig
    sparsity: float
    count_embeddings: bool = False

    @property
    def dense_shapes(self) -> list[LayerShape]:
        return [self.config.layer_shape(index) for index in range(self.config.num_hidden_layers)]

    @property
    def dense(self) -> int:
        return decoder_parameters(self.config, self.dense_shapes)

    @property
    def counted(self) -> int:
        """The parameters that ``sparsity`` is a fraction of."""
        return self.dense + (outer_parameters(self.config) if self.count_embeddings else 0)

    @property
    def remaining(self) -> int:
        return self.dense - round(self.sparsity * self.counted)

    @property
    def decoder_sparsity(self) -> float:
        """The fraction to remove of the decoder layers' parameters: ``sparsity`` itself where it is of those alone."""
        return self.sparsity * (self.counted / self.dense)
