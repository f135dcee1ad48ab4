"""How much a sparsity leaves, and in which layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from distprune.budgets.resources import Resource, StoredSizes, amount, attention_amount, ffn_amount, outer_amount
from distprune.config import PruneConfig
from distprune.modeling import LayerShape, PrunedConfig


@dataclass(frozen=True)
class Target:
    """How much of a resource the decoder layers may still take.

    Args:
        config: the dense model.
        sparsity: the fraction to remove, in [0, 1).
        count_embeddings: whether the fraction is of the whole model (embeddings, final norm and head included) or of
            the decoder layers alone. What is removed comes from the decoder layers either way.
        resource: what the fraction is of.
        stock: whether all layers are to have the same widths, so that the original architecture can describe them.
        sizes: how the dense model is stored; by default, all of it in the configuration's dtype.
    """

    config: PrunedConfig
    sparsity: float
    count_embeddings: bool = False
    resource: Resource = "parameters"
    stock: bool = False
    sizes: StoredSizes | None = None

    @property
    def dense_shapes(self) -> list[LayerShape]:
        return [self.config.layer_shape(index) for index in range(self.config.num_hidden_layers)]

    def amount(self, shapes: Sequence[LayerShape]) -> int:
        """What the decoder layers take if they have ``shapes``."""
        return sum(amount(*self._asked(index, shape)) for index, shape in enumerate(shapes))

    def attention_amount(self, index: int, shape: LayerShape) -> int:
        """What the attention of layer ``index`` takes if the layer has ``shape``."""
        return attention_amount(*self._asked(index, shape))

    def ffn_amount(self, index: int, shape: LayerShape) -> int:
        """What the FFN of layer ``index`` takes if the layer has ``shape``."""
        return ffn_amount(*self._asked(index, shape))

    def _asked(self, index: int, shape: LayerShape) -> tuple:
        return self.resource, self.config, index, shape, self.sizes and self.sizes.layers[index]

    @property
    def dense(self) -> int:
        """What the dense decoder layers take."""
        return self.amount(self.dense_shapes)

    @property
    def counted(self) -> int:
        """What ``sparsity`` is a fraction of."""
        return self.dense + (outer_amount(self.resource, self.config, self.sizes) if self.count_embeddings else 0)

    @property
    def remaining(self) -> int:
        return self.dense - round(self.sparsity * self.counted)

    @property
    def decoder_sparsity(self) -> float:
        """The fraction to remove of what the decoder layers take: ``sparsity`` itself where it is of those alone."""
        return self.sparsity * (self.counted / self.dense)


def target_of(config: PruneConfig, dense: PrunedConfig, sizes: StoredSizes) -> Target:
    """What a run asks for."""
    return Target(dense, config.sparsity, config.count_embeddings, config.target, config.layout == "stock", sizes)
