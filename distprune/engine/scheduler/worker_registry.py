"""A run's workers: who they are, where, and what they are seen to do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import isinf
from typing import Any

from distprune.engine.scheduler.nodes import Node, Nodes
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.telemetry.process_memory import PeakMemory
from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName
from distprune.engine.worker.host_tensor import size_of
from distprune.engine.worker.task import Task
from distprune.engine.worker.write_tasks import MeasureMemory


@dataclass
class Work:
    """An assignment in hand and the seconds that its steps so far have taken."""

    assignment: Assignment
    seconds: float = 0.0


class WorkerRegistry:
    """Asks for workers, sends those away that can't work where they are, and tells the progress what the others do.

    A worker's steps of one kind on one layer, as those of the dense pass are, count as one assignment.
    """

    def __init__(self, runtime: RayRuntime, sites: Nodes, progress: Progress):
        self.workers: list[Any] = []
        self._runtime, self._sites, self._progress = runtime, sites, progress
        self._names: dict[Any, WorkerName] = {}
        self._works: dict[Any, Work] = {}
        self._nodes: dict[Any, str] = {}  # Ray's ids, of the workers that are up
        self._on_this_node: set[Any] = set()

    # ---------------------------------------------------------------- who takes part

    def ask(self) -> Any:
        """A new worker, which Ray starts when there is room for it."""
        name = WorkerName(len(self._names))
        worker = self._runtime.start_worker(name.number, self._sites.refused)
        self.workers.append(worker)
        self._names[worker] = name
        self._progress.joining(name)
        return worker

    def admits(self, worker: Any, site: Node) -> bool:
        """A worker is up. Whether its device holds what it needs; if not, it goes."""
        name = self._names[worker] = WorkerName(self._names[worker].number, site.node)
        self._on_this_node.discard(worker)  # it may have been before it was lost
        if self._runtime.holds_results_of(site):
            self._on_this_node.add(worker)
        self._nodes[worker] = site.node_id
        if self._sites.suits(site):
            self._progress.joined(name)
            if warning := self._sites.crowding(site):
                self._progress.note(warning)
            return True
        self.send_away(worker)
        self._progress.note(self._sites.refusal(site))
        return False

    def send_away(self, worker: Any) -> None:
        """A worker goes for good."""
        self._drop_work(worker)
        self._progress.left(self._names[worker])
        self._nodes.pop(worker, None)
        self.workers.remove(worker)
        self._runtime.stop([worker], [])

    def replace(self) -> Any | None:
        """Another worker in place of one that went, if there is room elsewhere.

        Raises:
            InputError: there is none, and no worker is left.
        """
        if len(self.workers) < self._runtime.room(avoided=self._sites.refused):
            return self.ask()
        if not self.workers:
            raise self._sites.nowhere()
        return None

    def lose(self, worker: Any) -> None:
        """A worker was lost."""
        self._nodes.pop(worker, None)
        self._progress.lost(self._names[worker], self._drop_work(worker))

    def comes_back(self, worker: Any) -> None:
        """Ray restarts a worker that was lost, here or elsewhere."""
        self._progress.joining(self._names[worker])

    def drains(self, worker: Any, seconds: float) -> None:
        """A worker's node will be gone in so many seconds, or sometime."""
        self._progress.draining(self._names[worker], None if isinf(seconds) else seconds)

    def gives_up(self, worker: Any) -> None:
        """A worker can't end what it is at."""
        self._progress.gave_up(self._names[worker], self._drop_work(worker))

    def _drop_work(self, worker: Any) -> Assignment | None:
        work = self._works.pop(worker, None)
        return work and work.assignment

    def nodes(self) -> list[tuple[Any, str]]:
        """The workers that are up, each with Ray's id of its node."""
        return list(self._nodes.items())

    def is_on_this_node(self, worker: Any) -> bool:
        """Whether its results lie on the driver's node."""
        return worker in self._on_this_node

    # ---------------------------------------------------------------- what they do

    def begins(self, worker: Any, task: Task, values: Sequence[Any]) -> None:
        """A step begins, with values in the place of the task's fields."""
        self._progress.moved(size_of(values))
        assignment = Assignment(task.kind(), task.layer)
        if worker in self._works and self._works[worker].assignment == assignment:
            return
        self.rests(worker)
        self._works[worker] = Work(assignment)
        self._progress.began(self._names[worker], assignment)

    def ends(self, worker: Any, seconds: float, values: Sequence[Any]) -> None:
        """A step is done; whether the assignment is, is seen by what the worker does next."""
        self._progress.moved(size_of(values))
        self._works[worker].seconds += seconds

    def rests(self, worker: Any) -> None:
        """A worker has nothing to do, or something else."""
        if work := self._works.pop(worker, None):
            self._progress.ended(self._names[worker], work.assignment, work.seconds)

    def peak_memory(self, idle: Iterable[Any]) -> list[PeakMemory]:
        """Of workers that have nothing to do."""
        peaks = []
        for results in [self._runtime.call(worker, MeasureMemory(), []) for worker in idle]:
            with suppress(*self._runtime.lost):
                peaks += self._runtime.fetch(results)
        return peaks

    def gives(self, value: Any) -> Any:
        """A value is put where every worker can get it."""
        self._progress.moved(size_of(value))
        return self._runtime.put(value)
