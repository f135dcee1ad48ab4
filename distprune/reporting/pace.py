"""How long a stage still takes, from what its workers did so far and what they are doing."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from time import monotonic


@dataclass
class Shift:
    """A worker's time on one layer since ``since``, whatever it does for it; its present assignment began later."""

    layer: int | None
    since: float
    began: float
    at_work: bool = True


class Pace:
    """Of one stage at a time. The workers that are at work take the steps that are left, each when it is next free.

    A step takes as long as those before it did, on average. So the estimate follows how many can be at work at once: as
    many as there are blocks, one in a relay, and fewer at the end.
    """

    def __init__(self, clock: Callable[[], float] = monotonic):
        self._clock = clock
        self._shifts: dict[Hashable, Shift] = {}
        self.stage(0, 0)

    def stage(self, total: int, done: int) -> None:
        self._left, self._advanced, self._spent = total - done, 0, 0.0
        self._usual: float | None = None

    def advance(self) -> None:
        self._left -= 1
        self._advanced += 1
        self._usual = self._spent / self._advanced

    def began(self, worker: Hashable, layer: int | None) -> None:
        now, last = self._clock(), self._shifts.get(worker)
        since = last.since if last and last.layer == layer else now
        self._shifts[worker] = Shift(layer, since, now)

    def ended(self, worker: Hashable) -> None:
        shift = self._shifts[worker]
        self._spent += self._clock() - shift.began
        shift.at_work = False

    def gone(self, worker: Hashable) -> None:
        self._shifts.pop(worker, None)

    def time_left(self) -> float | None:
        """Seconds that the stage still takes; None while that can't be told."""
        now = self._clock()
        elapsed = [now - shift.since for shift in self._shifts.values() if shift.at_work]
        if self._left <= 0:
            return 0.0
        if self._usual is None or not elapsed:
            return None
        free = [max(0.0, self._usual - seconds) for seconds in elapsed][: self._left]
        heapq.heapify(free)
        for _ in range(self._left - len(free)):
            heapq.heapreplace(free, free[0] + self._usual)
        return max(free)
