"""How long calls usually take, from those that have ended."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from math import inf
from statistics import median

#: Calls of a kind that must have ended before it is said what they usually take.
FEWEST_ENDED = 3


class Durations:
    """Seconds of ended calls by the workers' method."""

    def __init__(self) -> None:
        self._ended: dict[str, list[float]] = defaultdict(list)

    def add(self, method: str, seconds: float) -> None:
        self._ended[method].append(seconds)

    def usual(self, method: str) -> float:
        """The median; infinite as long as too few have ended."""
        ended = self._ended[method]
        return median(ended) if len(ended) >= FEWEST_ENDED else inf

    def left(self, methods: Iterable[str], spent: float) -> float:
        """Usual seconds until the last of several is done, of which the first began ``spent`` seconds ago.

        Infinite where it is not known.
        """
        seconds = [self.usual(method) for method in methods] or [inf]
        return max(0.0, seconds[0] - spent) + sum(seconds[1:])
