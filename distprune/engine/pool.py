"""Worker actors and the calls that wait for an idle one. Ray restarts lost workers and repeats their calls."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import RayTaskError

from distprune.config import PruneConfig
from distprune.engine.cluster import WorkerPlan
from distprune.engine.memory import PeakMemory
from distprune.engine.worker import Worker
from distprune.errors import InputError

# A call survives this many losses of its worker; more mean that the layer itself is what kills it (out of memory).
RETRIES = 8
_STARTING = object()


class WorkerPool:
    """Workers take queued calls as they fall idle; a worker counts from the moment it is up, so none is waited for."""

    def __init__(self, plan: WorkerPlan, config: PruneConfig, model_path: Path, calibration_path: Path):
        options = {
            "num_cpus": plan.cpus,
            "num_gpus": plan.gpus,
            "max_restarts": -1,
            "max_task_retries": RETRIES,
        }
        self._queue: deque[tuple[Hashable, str, tuple]] = deque()
        self._busy: dict[ObjectRef, tuple[Any, Hashable, list[ObjectRef]]] = {}
        self._idle: deque[Any] = deque()
        self.workers = []
        for _ in range(plan.count):
            worker = Worker.options(**options).remote(config, model_path, calibration_path, plan.device)
            self.workers.append(worker)
            self._start(worker, _STARTING, "ready", ())

    def submit(self, key: Hashable, method: str, *arguments: Any) -> None:
        """Queue ``method(*arguments)``; :meth:`completed` will give its results under ``key``."""
        self._queue.append((key, method, arguments))

    def completed(self) -> Iterator[tuple[Hashable, list[ObjectRef]]]:
        """Results of calls as they finish, in no fixed order, until nothing is queued or running.

        More calls may be submitted meanwhile.

        Raises:
            InputError: a worker found bad input.
            ray.exceptions.RayError: a call failed otherwise.
        """
        while self._queue or any(key is not _STARTING for _, key, _ in self._busy.values()):
            while self._queue and self._idle:
                self._start(self._idle.popleft(), *self._queue.popleft())
            (done, *_), _ = ray.wait(list(self._busy), fetch_local=False)
            worker, key, results = self._busy.pop(done)
            self._idle.append(worker)
            if key is _STARTING:
                fetch(done)
            else:
                yield key, results

    def _start(self, worker: Any, key: Hashable, method: str, arguments: tuple) -> None:
        results = getattr(worker, method).remote(*arguments)
        results = results if isinstance(results, list) else [results]
        self._busy[results[-1]] = worker, key, results

    def peak_memory(self) -> list[PeakMemory]:
        """Peak memory of every worker that is up."""
        return ray.get([worker.peak_memory.remote() for worker in self._idle])

    def shutdown(self) -> None:
        for worker in self.workers:
            ray.kill(worker)


def fetch(result: ObjectRef) -> Any:
    """The value of a call's result.

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
