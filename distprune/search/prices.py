"""What parts were measured to cost, as multiples of what was predicted.

A plan is changed in one part at a time, to the next smaller and the next larger size on offer, and each time it is
measured how much more or less the model's predictions diverge from the dense model's. What all predictions have in
common does not matter to a plan; what one part costs beyond it becomes the part's price, by which the predicted costs
of all its sizes are multiplied. A single measurement is noisy, so a price is drawn towards one, as if the prediction
had been measured to be right once more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from distprune.search.part_options import PartOptions

#: A step changes a part's price by no more than this factor.
LARGEST_CHANGE = 3.0


@dataclass(frozen=True)
class Change:
    """One part of a plan in another size.

    Attributes:
        part: its place among all parts.
        choice: its size's place among the options.
    """

    part: int
    choice: int

    def of(self, choices: Sequence[int]) -> list[int]:
        """The choices of all parts after it."""
        return [self.choice if part == self.part else choice for part, choice in enumerate(choices)]


def changed_choices(parts: Sequence[PartOptions], choices: Sequence[int]) -> list[Change]:
    """To the next smaller and the next larger size of every part, as far as there are such."""
    return [
        Change(number, choice)
        for number, (part, chosen) in enumerate(zip(parts, choices, strict=True))
        for choice in (chosen - 1, chosen + 1)
        if 0 <= choice < len(part.shapes)
    ]


def corrected_prices(
    parts: Sequence[PartOptions], choices: Sequence[int], prices: Sequence[float], measured: Mapping[Change, float]
) -> list[float]:
    """The prices after a plan's changes were measured.

    Args:
        parts: what each part may become.
        choices: the plan, of each part the option that it has.
        prices: before.
        measured: by how much more each change lets the predictions diverge, in nats a token; negative of a larger size.
    """
    predicted = {
        change: prices[change.part]
        * (parts[change.part].costs[change.choice] - parts[change.part].costs[choices[change.part]])
        for change in measured
    }
    telling = [change for change in measured if predicted[change]]
    if not telling:
        return list(prices)
    common = float(np.median([measured[change] / predicted[change] for change in telling]))
    trust = float(np.median([abs(predicted[change]) for change in telling]))
    if common <= 0:  # such measurements tell nothing
        return list(prices)
    found = list(prices)
    for number in {change.part for change in telling}:
        own = [change for change in telling if change.part == number]
        expected = sum(abs(predicted[change]) for change in own)
        seen = sum(float(np.sign(predicted[change])) * measured[change] / common for change in own)
        factor = (seen + trust) / (expected + trust)
        found[number] = prices[number] * float(np.clip(factor, 1 / LARGEST_CHANGE, LARGEST_CHANGE))
    return found


def part_of_the_way(before: Sequence[float], after: Sequence[float], share: float) -> list[float]:
    """Prices between two, ``share`` of the way on a logarithmic scale."""
    return [old * (new / old) ** share for old, new in zip(before, after, strict=True)]
