"""Nodes that are about to go, as spot machines are told a minute or two before, and the workers that leave with them.

Ray calls such a node draining: it starts nothing more there, and tells when the node will be gone, if it knows.
"""

from __future__ import annotations

from math import inf, isinf
from typing import Any

from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.scheduler.worker_registry import WorkerRegistry

ASK_EVERY = 1.0  # seconds


class Draining:
    """Which workers are to leave, and whether what they are at can end before their node is gone."""

    def __init__(self, runtime: RayRuntime, registry: WorkerRegistry):
        self._runtime, self._registry = runtime, registry
        self._next_look = -inf
        self._gone_at: dict[Any, float] = {}  # by worker

    def look(self) -> list[Any] | None:
        """Ask Ray, if the last time was long enough ago. Returns the workers that are to leave from now on.

        None is returned where it is too early to ask.
        """
        now = self._runtime.now()
        if now < self._next_look:
            return None
        self._next_look = now + ASK_EVERY
        draining = self._runtime.draining()
        found = []
        for worker, node in self._registry.nodes():
            if node in draining:
                found += [worker] if worker not in self._gone_at else []
                self._gone_at[worker] = now + draining[node]
        return found

    def is_leaving(self, worker: Any) -> bool:
        return worker in self._gone_at

    def seconds_left(self, worker: Any) -> float:
        """Until the node of a worker that is leaving is gone; infinite where nobody knows."""
        return self._gone_at[worker] - self._runtime.now()

    def can_end(self, worker: Any, seconds: float) -> bool:
        """Whether a leaving worker has time for so many seconds of work; of work that nobody knows, as long as any."""
        left = self.seconds_left(worker)
        return left > 0 if isinf(seconds) else seconds < left

    def forget(self, worker: Any) -> None:
        """It has left."""
        self._gone_at.pop(worker, None)
