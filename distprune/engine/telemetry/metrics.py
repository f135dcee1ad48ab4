"""A run's figures for Prometheus, through Ray: every node serves those of its processes, as ``ray_distprune_*``.

Where Ray was installed without its ``default`` extra they go nowhere. A run's name is a path, of which Ray takes ASCII
alone.
"""

from __future__ import annotations

import threading
from time import monotonic, sleep
from weakref import ref

import psutil
import torch
from ray.util.metrics import Counter, Gauge, Histogram

from distprune.engine.telemetry.harmless import harmless
from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName

# Seconds of a call, from a small model's on a CPU to a very large one's.
BUCKETS = [0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000]
# Seconds between two looks at a worker's memory; Ray itself reports every ten by default.
LOOK_EVERY = 5.0


class RunMetrics(Progress):
    """Of one run, under its name; made and told where Ray is up."""

    def __init__(self, run: str):
        self._run, self._up = {"run": in_ascii(run)}, set()
        self._stage, self._steps, self._began = "", 0, monotonic()
        by_stage, by_call = ("run", "stage"), ("run", "call")
        self._total = Gauge("distprune_stage_steps", "Steps of a stage, mostly layers", by_stage)
        self._done = Gauge("distprune_stage_steps_done", "Steps of a stage done, by earlier runs too", by_stage)
        self._seconds = Gauge("distprune_stage_seconds", "Seconds since a stage began, at its last step", by_stage)
        self._calls = Histogram("distprune_call_seconds", "Seconds of workers' calls", BUCKETS, by_call)
        # Ray makes a histogram's sum up from its buckets.
        self._busy = Counter("distprune_busy_seconds", "Seconds of workers' calls, summed up", by_call)
        self._lost = Counter("distprune_calls_lost", "Calls that were lost with their worker", by_call)
        self._moved = Counter("distprune_object_store_bytes", "Bytes of tensors put and fetched", ("run",))
        self._workers = Gauge("distprune_workers", "Workers that are up", ("run",))

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._stage, self._steps, self._began = name, done, monotonic()
        self._total.set(total, self._by_stage())
        self._tell_steps()

    def advance(self) -> None:
        self._steps += 1
        self._tell_steps()

    def joined(self, worker: WorkerName) -> None:
        self._up.add(worker.number)
        self._tell_workers()

    def lost(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self._up.discard(worker.number)
        self._tell_workers()
        if assignment:
            self._lost.inc(1, self._run | {"call": assignment.method})

    def left(self, worker: WorkerName) -> None:
        self._up.discard(worker.number)
        self._tell_workers()

    def ended(self, worker: WorkerName, assignment: Assignment, seconds: float) -> None:
        by_call = self._run | {"call": assignment.method}
        self._calls.observe(seconds, by_call)
        if seconds > 0:
            self._busy.inc(seconds, by_call)

    def moved(self, size: int) -> None:
        if size:
            self._moved.inc(size, self._run)

    def __exit__(self, *error) -> None:
        self._up.clear()
        self._tell_workers()

    def _by_stage(self) -> dict[str, str]:
        return self._run | {"stage": self._stage}

    def _tell_steps(self) -> None:
        self._done.set(self._steps, self._by_stage())
        self._seconds.set(monotonic() - self._began, self._by_stage())

    def _tell_workers(self) -> None:
        self._workers.set(len(self._up), self._run)


class MemoryMetrics(threading.Thread):
    """Tells the memory of the process that it runs in, for as long as there is the worker that it is the memory of."""

    def __init__(self, worker: object, run: str, number: int):
        super().__init__(name="memory metrics", daemon=True)
        self._worker = ref(worker)
        self._tags = {"run": in_ascii(run), "worker": str(number)}

    def run(self) -> None:
        with harmless("metrics"):
            tags, process = tuple(self._tags), psutil.Process()
            resident = Gauge("distprune_worker_resident_bytes", "Memory of a worker's process", tags)
            device = Gauge("distprune_worker_device_bytes", "What torch holds of a worker's GPU", tags)
            while self._worker() is not None:
                resident.set(process.memory_info().rss, self._tags)
                device.set(torch.cuda.memory_reserved() if torch.cuda.is_initialized() else 0, self._tags)
                sleep(LOOK_EVERY)


def in_ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()
