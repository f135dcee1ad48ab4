"""Worker actors and the calls that wait for an idle one.

A worker, or the node it is on, may vanish at any moment: its call goes back into the queue for whichever worker is idle
next, and Ray restarts it where it finds room. What calls give is fetched to the driver's node at once, so that nothing
but the call itself is ever lost with a worker.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
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
LOST = (RayActorError, NodeDiedError, ObjectLostError, OutOfMemoryError, WorkerCrashedError)


@dataclass(frozen=True)
class Later:
    """An argument that is made when its call starts, and again if it must start again; nothing is held until then."""

    make: Callable[[], Any]


@dataclass
class Call:
    """A worker's method, its arguments and who takes its results; ``losses`` counts the workers lost in it."""

    method: str
    arguments: tuple
    then: Callable[..., None]
    losses: int = 0

    def __str__(self) -> str:
        return f"'{self.method}'" + (f" of layer {self.arguments[0]}" if self.arguments else "")


class WorkerPool:
    """Workers take queued calls as they fall idle; a worker counts from the moment it is up, so none is waited for."""

    def __init__(self, plan: WorkerPlan, config: PruneConfig, model_path: Path, calibration_path: Path):
        options = {"num_cpus": plan.cpus, "num_gpus": plan.gpus, "max_restarts": -1}
        self._queue: deque[Call] = deque()
        self._running: dict[ObjectRef, tuple[Any, Call, list[ObjectRef]]] = {}
        self._starting: dict[ObjectRef, Any] = {}
        self._idle: deque[Any] = deque()
        self.workers = [
            Worker.options(**options).remote(config, model_path, calibration_path, plan.device)
            for _ in range(plan.count)
        ]
        for worker in self.workers:
            self._await(worker)

    def is_up(self, patience: float) -> bool:
        """Whether a worker is up within ``patience`` seconds."""
        done, _ = ray.wait(list(self._starting), timeout=patience, fetch_local=False)
        return bool(done)

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
        while self._queue or self._running:
            (done, *_), _ = ray.wait([*self._running, *self._starting], fetch_local=False)
            if done in self._starting:
                fetch(done)
                self._employ(self._starting.pop(done))
            else:
                self._finish(done)

    def _finish(self, done: ObjectRef) -> None:
        worker, call, results = self._running.pop(done)
        try:
            values = fetch(results)
        except LOST as error:
            self._put_back(call, error)
            self._await(worker)
        else:
            self._employ(worker)
            call.then(*values)

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
        self._running[results[0]] = worker, call, results

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
