"""Worker actors and the calls that wait for an idle one.

Workers join when there is room for them. A worker, or the node it is on, may vanish at any moment: its call goes back
into the queue for whichever worker is idle next, and Ray restarts it where it finds room. What calls give is fetched to
the driver's node at once, so that nothing but the call itself is ever lost with a worker. A call that takes far longer
than its like is also given to an idle worker; calls are pure, so whichever ends first gives the bytes that the other
would.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)

from distprune.config import PruneConfig
from distprune.engine.cluster import WorkerPlan
from distprune.engine.memory import PeakMemory
from distprune.engine.worker import Worker
from distprune.errors import InputError, WorkersLost

# A call survives this many losses of its worker; more mean that the layer itself is what kills it (out of memory).
LOSSES = 4
# An idle worker takes over a call that has run this many times as long as its like usually do.
STRAGGLES = 3
FEWEST_ENDED = 3  # calls of a kind that must have ended before one is said to straggle
LOOK_EVERY = 1.0  # seconds
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)


@dataclass(frozen=True)
class Later:
    """An argument that is made when its call starts, and again if it must start again; nothing is held until then."""

    make: Callable[[], Any]


@dataclass
class Call:
    """A worker's method, its arguments and who takes its results.

    ``losses`` counts the workers lost in it, ``copies`` those at work on it now.
    """

    method: str
    arguments: tuple
    then: Callable[..., None]
    losses: int = 0
    copies: int = 0
    done: bool = False

    def __str__(self) -> str:
        return f"'{self.method}'" + (f" of layer {self.arguments[0]}" if self.arguments else "")


@dataclass(frozen=True)
class Running:
    """A call at work: where, since when, and its results to be."""

    worker: Any
    call: Call
    results: list[ObjectRef]
    since: float


class WorkerPool:
    """Workers take queued calls as they fall idle; a worker counts from the moment it is up, so none is waited for."""

    def __init__(self, plan: WorkerPlan, config: PruneConfig, model_path: Path, calibration_path: Path):
        options = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "max_restarts": -1}
        self._queue: deque[Call] = deque()
        self._running: dict[ObjectRef, Running] = {}
        self._took: dict[str, list[float]] = {}
        self._starting: dict[ObjectRef, Any] = {}
        self._idle: deque[Any] = deque()
        self.workers = [
            Worker.options(**options).remote(config, model_path, calibration_path, plan.device)
            for _ in range(plan.count)
        ]
        for worker in self.workers:
            self._await(worker)

    def are_up(self, count: int, patience: float | None) -> bool:
        """Whether so many workers are up within ``patience`` seconds; None waits until they are."""
        done, _ = ray.wait(list(self._starting), num_returns=count, timeout=patience, fetch_local=False)
        return len(done) == count

    def submit(self, then: Callable[..., None], method: str, *arguments: Any) -> None:
        """Queue the workers' ``method(*arguments)``; :meth:`run` calls ``then`` with its results.

        An argument may be a :class:`Later`.
        """
        self._queue.append(Call(method, arguments, then))
        self._dispatch()

    def run(self) -> None:
        """Wait for all calls, in no fixed order, and for those that are submitted meanwhile.

        A worker gets its next call before the results of the last are looked at, and nothing here holds on to them.

        Raises:
            InputError: a worker found bad input.
            WorkersLost: a call lost too many workers.
            ray.exceptions.RayError: a call failed otherwise.
        """
        while self._queue or any(not running.call.done for running in self._running.values()):
            ended, _ = ray.wait([*self._running, *self._starting], timeout=LOOK_EVERY, fetch_local=False)
            if not ended:
                self._take_over_stragglers()
            elif ended[0] in self._starting:
                fetch(ended[0])
                self._employ(self._starting.pop(ended[0]))
            else:
                self._finish(self._running.pop(ended[0]))

    def _finish(self, running: Running) -> None:
        call = running.call
        call.copies -= 1
        try:
            values = fetch(running.results)
        except LOST as error:
            self._await(running.worker)
            if not call.done and not call.copies:
                self._put_back(call, error)
        else:
            self._employ(running.worker)
            if not call.done:
                call.done = True
                self._took.setdefault(call.method, []).append(time.monotonic() - running.since)
                call.then(*values)

    def _take_over_stragglers(self) -> None:
        for running in list(self._running.values()):
            took = self._took.get(running.call.method, [])
            usual = median(took) if len(took) >= FEWEST_ENDED else inf
            late = time.monotonic() - running.since > STRAGGLES * max(usual, LOOK_EVERY)
            if self._idle and late and running.call.copies == 1 and not running.call.done:
                self._start(self._idle.popleft(), running.call)

    def _employ(self, worker: Any) -> None:
        self._idle.append(worker)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            self._start(self._idle.popleft(), self._queue.popleft())

    def _await(self, worker: Any) -> None:
        self._starting[worker.ready.remote()] = worker

    def _start(self, worker: Any, call: Call) -> None:
        arguments = [argument.make() if isinstance(argument, Later) else argument for argument in call.arguments]
        results = getattr(worker, call.method).remote(*arguments)
        results = results if isinstance(results, list) else [results]
        call.copies += 1
        self._running[results[0]] = Running(worker, call, results, time.monotonic())

    def _put_back(self, call: Call, error: Exception) -> None:
        call.losses += 1
        if call.losses > LOSSES:
            raise WorkersLost(
                f"{call} lost {call.losses} workers in a row, most likely for lack of memory. "
                f"Take fewer --workers or a smaller --micro-batch. Ray says: {str(error).strip()}"
            ) from error
        self._queue.appendleft(call)
        self._dispatch()

    def peak_memory(self) -> list[PeakMemory]:
        """Peak memory of every worker that is up."""
        peaks = []
        for result in [worker.peak_memory.remote() for worker in self._idle]:
            with suppress(*LOST):
                peaks.append(fetch(result))
        return peaks

    def shutdown(self) -> None:
        for ready in self._starting:
            ray.cancel(ready)
        for worker in self.workers:
            ray.kill(worker)


def fetch(result: ObjectRef | list[ObjectRef]) -> Any:
    """The value of a call's result, or the values of several.

    Raises:
        InputError: what the worker raised.
        ray.exceptions.RayError: any other failure.
    """
    try:
        return ray.get(result)
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        raise
