"""What one part of a layer may become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distprune.budgets.allocation import Curve
from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape

#: The shape of a part; None where it goes whole.
PartShape = AttentionShape | FeedForwardShape | ExpertsShape | None


@dataclass(frozen=True)
class Menu:
    """What one part of a layer, its ``attention`` or ``ffn``, or what is ``shared`` beside experts, may become, and
    what that costs and takes.

    Attributes:
        layer: which layer.
        part: which part of it.
        shapes: that it may have.
        costs: the predicted increase of the loss with each of them.
        amounts: what each of them takes of the budgeted resource.
    """

    layer: int
    part: str
    shapes: Sequence[PartShape]
    costs: Sequence[float]
    amounts: Sequence[int]

    @property
    def curve(self) -> Curve:
        return Curve(self.costs, self.amounts)

    def at_price(self, price: float) -> Menu:
        """The same options, each costing ``price`` times as much."""
        return replace(self, costs=[price * cost for cost in self.costs])

    def only(self, places: Sequence[int]) -> Menu:
        """The options at some places alone."""
        return replace(
            self,
            shapes=[self.shapes[place] for place in places],
            costs=[self.costs[place] for place in places],
            amounts=[self.amounts[place] for place in places],
        )
