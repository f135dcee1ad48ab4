"""The shapes at which a layer is measured: a grid of each part's own, so that all can be interpolated between."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np

from distprune.latency.isotonic import monotone
from distprune.latency.latency_table import NARROWED, Grid, KindLatencies, Seconds
from distprune.layers.architecture import Architecture
from distprune.layers.shapes import AttentionShape, FeedForwardShape, LayerShape, Removable

#: Widths and ranks that are measured are multiples of it, as kernels like them.
UNIT = 8
#: How many numbers of KV groups, and how many widths of a feed-forward network.
GROUPS, WIDTHS = 5, 14
#: Shares of the whole at which narrower heads are measured, and ranks.
NARROWER, RANKS = (1 / 8, 7 / 8), (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1)


@dataclass(frozen=True)
class MeasuredGrid:
    """A grid of shapes, and the shapes whose seconds are to be taken from theirs.

    Attributes:
        name: of the field of :class:`distprune.latency.KindLatencies`.
        axes: by a field of the shape, its values.
        shapes: of the layer at all points, those along the last axis following each other.
        less: the same for what is taken from each; None for nothing.
    """

    name: str
    axes: dict[str, list[int]]
    shapes: list[LayerShape]
    less: list[LayerShape | None]

    def filled(self, seconds: Mapping[LayerShape, Seconds]) -> Grid:
        """The grid, from what a layer of each shape has taken; no wider part takes less, and no higher rank.

        No part takes less than nothing, which a clock may say of one that is tiny.
        """
        taken = [
            seconds[shape] - (0 if less is None else seconds[less])
            for shape, less in zip(self.shapes, self.less, strict=True)
        ]
        array = np.stack(taken, axis=-1).reshape(-1, *map(len, self.axes.values()))
        for piece in product(*(of_the_same_modules(name, nodes) for name, nodes in self.axes.items())):
            part = array[(slice(None), *piece)]
            if part.size:
                array[(slice(None), *piece)] = monotone(part, self._rising)
        return Grid.of(self.axes, array if self.is_of_rank else array.clip(min=0))

    @property
    def _rising(self) -> list[int]:
        """The axes along which seconds rise: all, but of what a rank adds that of the rank alone."""
        return [1 + place for place, axis in enumerate(self.axes) if axis == self.name or not self.is_of_rank]

    @property
    def is_of_rank(self) -> bool:
        """Whether it is of what a rank adds to a part."""
        return self.name in self.axes


def of_the_same_modules(axis: str, nodes: list[int]) -> list[slice]:
    """The stretches of an axis along which the same modules become wider."""
    return [slice(0, len(nodes) - 1), slice(len(nodes) - 1, None)] if axis in NARROWED else [slice(None)]


def measured_grids(model: Architecture, index: int) -> list[MeasuredGrid]:
    """All grids of a layer that has no mixture of experts."""
    dense, bare, removable = model.dense_shape(index), without_parts(model, index), model.removable(index)
    grids = [MeasuredGrid("rest", {}, [bare], [None])]
    if dense.attention and removable.attention:
        grids += attention_grids(dense.attention, bare, removable, model.hidden_size)
    if isinstance(dense.ffn, FeedForwardShape) and (removable.ffn or removable.neurons):
        grids += ffn_grids(dense.ffn, bare, removable, model.hidden_size)
    return grids


def filled_grids(dense: LayerShape, grids: list[MeasuredGrid], seconds: Mapping[LayerShape, Seconds]) -> KindLatencies:
    """The latencies of layers, from what one of them has taken in each shape of the grids."""
    parts = {grid.name: grid.filled(seconds) for grid in grids if not grid.is_of_rank}
    kind = KindLatencies(shape=dense.to_json(), **parts)
    of_ranks = [grid for grid in grids if grid.is_of_rank]
    # Ranks are added to what the grids say, so it is from that, and not from one measurement, that they differ.
    without = {shape: kind.seconds(shape) for grid in of_ranks for shape in grid.less if shape is not None}
    return kind.model_copy(update={grid.name: grid.filled({**seconds, **without}) for grid in of_ranks})


def without_parts(model: Architecture, index: int) -> LayerShape:
    """The layer without the parts that can go; its feed-forward network as narrow as can be where it can't go whole."""
    dense, removable = model.dense_shape(index), model.removable(index)
    ffn = dense.ffn
    if isinstance(ffn, FeedForwardShape):
        narrow = replace(ffn, width=widths_of(ffn.width)[0]) if removable.neurons else ffn
        ffn = None if removable.ffn else narrow
    return LayerShape(None if removable.attention else dense.attention, ffn)


def attention_grids(
    dense: AttentionShape, bare: LayerShape, removable: Removable, hidden_size: int
) -> Iterator[MeasuredGrid]:
    """Fewer groups with narrower values and fewer pairs; and each of the factored projections."""
    axes = {
        "kv_heads": counts(dense.kv_heads) if removable.heads else [dense.kv_heads],
        "value_dim": narrower(dense.value_dim) if removable.values else [dense.value_dim],
        "query_key_dim": narrower(dense.query_key_dim) if removable.pairs else [dense.query_key_dim],
    }
    shapes = [replace(bare, attention=with_groups(dense, **place)) for place in points(axes)]
    yield MeasuredGrid("attention", axes, shapes, [bare] * len(shapes))
    outputs = {
        "query_rank": dense.query_heads * dense.query_key_dim,
        "key_rank": dense.kv_heads * dense.query_key_dim,
        "output_rank": dense.query_heads * dense.value_dim,
    }
    for name, width in outputs.items() if removable.factors else ():
        # Above it, two factors have more parameters than the matrix.
        most = max(1, hidden_size * width // (hidden_size + width))
        ranks = {name: multiples(share * most for share in RANKS)}
        beside = {"value_dim": axes["value_dim"]} if name == "output_rank" else {}
        factored = [changed(dense, **place) for place in points(beside | ranks)]
        yield MeasuredGrid(
            name,
            beside | ranks,
            [replace(bare, attention=shape) for shape in factored],
            [replace(bare, attention=changed(shape, **{name: None})) for shape in factored],
        )


def ffn_grids(
    dense: FeedForwardShape, bare: LayerShape, removable: Removable, hidden_size: int
) -> Iterator[MeasuredGrid]:
    """Widths; and ranks of a branch beside a network of half the width."""
    widths = widths_of(dense.width) if removable.neurons else [dense.width]
    shapes = [replace(bare, ffn=replace(dense, width=width)) for width in widths]
    yield MeasuredGrid("ffn", {"width": widths}, shapes, [bare] * len(shapes))
    if removable.branch:
        ranks, half = multiples(share * hidden_size for share in RANKS), shapes[len(shapes) // 2]
        beside = [half.with_ffn(branch_rank=rank) for rank in ranks]
        yield MeasuredGrid("branch_rank", {"branch_rank": ranks}, beside, [half] * len(ranks))


def points(axes: Mapping[str, list[int]]) -> Iterator[dict[str, int]]:
    """The points of a grid, those along the last axis following each other."""
    return (dict(zip(axes, values, strict=True)) for values in product(*axes.values()))


def with_groups(dense: AttentionShape, kv_heads: int, **widths: int) -> AttentionShape:
    """The attention with so many groups, of as many heads as before, and other widths."""
    return changed(dense, kv_heads=kv_heads, query_heads=kv_heads * dense.heads_per_group, **widths)


def changed(shape: AttentionShape, **changes: Any) -> AttentionShape:
    """The shape with other values of some fields."""
    return replace(shape, **changes)


def counts(dense: int) -> list[int]:
    """Some numbers from one to all."""
    return sorted({round(count) for count in np.linspace(1, dense, GROUPS)})


def narrower(dense: int) -> list[int]:
    """Some even widths, for rotary pairs, and the whole one."""
    return sorted({max(2, int(share * dense) // 2 * 2) for share in NARROWER if dense > 2} | {dense})


def widths_of(dense: int) -> list[int]:
    """Some widths of a feed-forward network, the narrowest of :data:`UNIT` and the last the whole one."""
    return [*(width for width in multiples(dense * step / WIDTHS for step in range(WIDTHS)) if width < dense), dense]


def multiples(values: Iterable[float]) -> list[int]:
    """The nearest multiples of :data:`UNIT`, ascending, none of them 0."""
    return sorted({max(UNIT, round(value / UNIT) * UNIT) for value in values})
