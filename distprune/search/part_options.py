"""The few sizes of every part of a layer that a library holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any, Literal

import numpy as np

from distprune.budgets import Menu, PartShape, Target, hull_of
from distprune.layers.shapes import AttentionShape, ExpertsShape, LayerShape

LayerPart = Literal["attention", "ffn"]
#: Between the whole part and the smallest that its menu has there are steps of one such part.
STEPS = 8


@dataclass(frozen=True)
class PartOptions:
    """What one part of a layer may become.

    Attributes:
        layer: which layer.
        part: which part of it.
        shapes: from the dense one, which is the first, to the smallest.
        costs: the predicted increase of the loss with each of them, in nats a token.
    """

    layer: int
    part: LayerPart
    shapes: Sequence[PartShape]
    costs: Sequence[float]

    def to_json(self) -> dict[str, Any]:
        """The options as JSON can hold them, for :meth:`from_json`."""
        return {
            "layer": self.layer,
            "part": self.part,
            "shapes": [shape and asdict(shape) for shape in self.shapes],
            "costs": [*self.costs],
        }

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> PartOptions:
        """The options that :meth:`to_json` said.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        part: LayerPart = said["part"]
        absent = {"attention": None, "ffn": None}
        layers = [LayerShape.from_json({**absent, part: shape}) for shape in said["shapes"]]
        return cls(said["layer"], part, [getattr(layer, part) for layer in layers], said["costs"])

    def menu(self, target: Target, price: float = 1.0) -> Menu:
        """The options at a price, with what they take of the target's resource."""
        amounts = [amount_of(target, self.layer, self.part, shape) for shape in self.shapes]
        return Menu(self.layer, self.part, self.shapes, self.costs, amounts).at_price(price)


def amount_of(target: Target, layer: int, part: LayerPart, shape: PartShape) -> int:
    """What a part of a layer takes of the target's resource in a shape."""
    if part == "attention":
        assert shape is None or isinstance(shape, AttentionShape)
        return target.attention_amount(layer, shape)
    assert not isinstance(shape, AttentionShape)
    return target.ffn_amount(layer, shape)


def library_options(target: Target, menus: Iterable[Menu], steps: int = STEPS) -> list[PartOptions]:
    """A few of the options of each part's menu: the whole part, and up to ``steps`` smaller ones of even spacing.

    They lie on the lower convex hull of the costs against what they take of the target's resource, since no other
    option is ever worth choosing.
    """
    return [thinned(target, menu, steps) for menu in joined(menus)]


def joined(menus: Iterable[Menu]) -> list[Menu]:
    """The menus, one for each part: a mixture and the network beside its experts are one part."""
    found: list[Menu] = []
    for menu in menus:
        found.append(with_shared(found.pop(), menu) if menu.part == "shared" else menu)
    return found


def with_shared(experts: Menu, shared: Menu) -> Menu:
    """The menu of a mixture with that of the network beside its experts."""
    shapes: list[PartShape] = []
    costs, amounts = [], []
    for one, other in product(range(len(experts.shapes)), range(len(shared.shapes))):
        mixture, beside = experts.shapes[one], shared.shapes[other]
        assert isinstance(mixture, ExpertsShape)
        assert isinstance(beside, ExpertsShape)
        shapes.append(replace(mixture, shared_width=beside.shared_width))
        costs.append(experts.costs[one] + shared.costs[other])
        amounts.append(experts.amounts[one] + shared.amounts[other])
    return Menu(experts.layer, "ffn", shapes, costs, amounts)


def thinned(target: Target, menu: Menu, steps: int) -> PartOptions:
    """Some of a menu's options, that of the dense part first."""
    curve = menu.curve
    hull = hull_of(curve.table)
    amounts = curve.table.amounts[hull]
    wanted = np.linspace(amounts[-1], amounts[0], 1 + steps)
    nearest = dict.fromkeys(int(np.abs(amounts - amount).argmin()) for amount in wanted)
    chosen = [int(curve.options[hull[place]]) for place in nearest]
    dense = getattr(target.dense_shape(menu.layer), menu.part)
    smaller = [(menu.shapes[option], float(menu.costs[option])) for option in chosen if menu.shapes[option] != dense]
    shapes, costs = map(list, zip((dense, 0.0), *smaller, strict=True))
    part: LayerPart = "attention" if menu.part == "attention" else "ffn"
    return PartOptions(menu.layer, part, shapes, costs)
