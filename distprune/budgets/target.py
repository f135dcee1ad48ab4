"""How much a sparsity leaves, and in which layout."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

from distprune.budgets.layouts import Layout
from distprune.budgets.resources import Resource, StoredSizes, attention_amount, ffn_amount, outer_amount, rest_amount
from distprune.config import PruneConfig
from distprune.latency import LatencyTable, latency_table_for
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape, Removable

#: Names of what may go: from attention, from feed-forward networks, and in layouts that say whole units alone.
ATTENTION = frozenset(("heads", "values", "pairs", "factors", "attention"))
FFN = frozenset(("neurons", "experts", "branch", "ffn"))
REMOVABLE, UNITS = ATTENTION | FFN, frozenset(("heads", "neurons", "experts"))


@dataclass(frozen=True)
class Target:
    """How much of a resource the decoder layers may still take.

    Amounts are counted once for all layers that are alike.

    Args:
        model: the dense model.
        sparsity: the fraction to remove, in [0, 1).
        count_embeddings: whether the fraction is of the whole model (embeddings, final norm and head included) or of
            the decoder layers alone. What is removed comes from the decoder layers either way.
        resource: what the fraction is of.
        layout: how the layers' shapes may differ from each other and from the dense ones.
        sizes: how the dense model is stored; by default, all of it in the model's dtype.
        latencies: what was measured of the dense model, where the resource is latency.
    """

    model: Architecture
    sparsity: float
    count_embeddings: bool = False
    resource: Resource = "parameters"
    layout: Layout = "free"
    sizes: StoredSizes | None = None
    latencies: LatencyTable | None = None

    @cached_property
    def _dense_shapes(self) -> tuple[LayerShape, ...]:
        return tuple(map(self.model.dense_shape, range(self.model.num_layers)))

    @property
    def dense_shapes(self) -> list[LayerShape]:
        """The shapes of the dense layers."""
        return [*self._dense_shapes]

    def dense_shape(self, index: int) -> LayerShape:
        """The shape of a dense layer."""
        return self._dense_shapes[index]

    def removable(self, index: int) -> Removable:
        """What may go from layer ``index``: nothing that it lacks, and no more than the layout can say."""
        return self._removables[index]

    @cached_property
    def _removables(self) -> list[Removable]:
        return [
            within(self.layout, shape, self.model.removable(index)) for index, shape in enumerate(self._dense_shapes)
        ]

    def amount(self, shapes: Sequence[LayerShape]) -> int:
        """What the decoder layers take if they have ``shapes``."""
        return sum(self.layer_amount(index, shape) for index, shape in enumerate(shapes))

    def layer_amount(self, index: int, shape: LayerShape) -> int:
        """What layer ``index`` takes if it has ``shape``."""
        parts = self.attention_amount(index, shape.attention), self.ffn_amount(index, shape.ffn)
        return sum(parts) + self._count(rest_amount, index)

    def attention_amount(self, index: int, shape: AttentionShape | None) -> int:
        """What the attention of layer ``index`` takes if it has ``shape``."""
        return self._count(attention_amount, index, shape)

    def ffn_amount(self, index: int, shape: FeedForwardShape | ExpertsShape | None) -> int:
        """What the feed-forward network of layer ``index`` takes if it has ``shape``, its branch included."""
        return self._count(ffn_amount, index, shape)

    def _count(
        self, amount: Callable[..., int], index: int, *shape: AttentionShape | FeedForwardShape | ExpertsShape | None
    ) -> int:
        key = amount, self._kinds[index], *shape
        if key not in self._counted:
            sizes = self.sizes and self.sizes.layers[index]
            self._counted[key] = amount(self.resource, self.model, index, *shape, sizes=sizes, latencies=self.latencies)
        return self._counted[key]

    @cached_property
    def _counted(self) -> dict[Hashable, int]:
        return {}

    @cached_property
    def _kinds(self) -> list[int]:
        """Of each layer a number that those have in common which are alike and stored alike."""
        stored = [tuple(sizes.items()) for sizes in self.sizes.layers] if self.sizes else [()] * self.model.num_layers
        numbers: dict[Hashable, int] = {}
        kinds = [(self.model.kind(index), stored[index]) for index in range(self.model.num_layers)]
        return [numbers.setdefault(kind, len(numbers)) for kind in kinds]

    @cached_property
    def dense(self) -> int:
        """What the dense decoder layers take."""
        return self.amount(self.dense_shapes)

    @cached_property
    def counted(self) -> int:
        """What ``sparsity`` is a fraction of."""
        return self.dense + (outer_amount(self.resource, self.model, self.sizes) if self.count_embeddings else 0)

    @property
    def remaining(self) -> int:
        """What the decoder layers may take."""
        return self.dense - round(self.sparsity * self.counted)

    @property
    def decoder_sparsity(self) -> float:
        """The fraction to remove of what the decoder layers take: ``sparsity`` itself where it is of those alone."""
        return self.sparsity * (self.counted / self.dense)


def within(layout: Layout, dense: LayerShape, removable: Removable) -> Removable:
    """What may go from a layer in a layout, of what may go by its family."""
    says = REMOVABLE if layout == "free" else UNITS
    has = (REMOVABLE - ATTENTION if dense.attention is None else REMOVABLE) - (FFN if dense.ffn is None else set())
    return Removable(**{name: getattr(removable, name) for name in says & has})


def target_of(config: PruneConfig, model: Architecture, sizes: StoredSizes) -> Target:
    """What a run asks for.

    Raises:
        InputError: it is a latency, and no table of the model's latencies can be read.
    """
    latencies = latency_table_for(config, model)
    return Target(model, config.sparsity, config.count_embeddings, config.target, config.layout, sizes, latencies)
