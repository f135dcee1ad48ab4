"""What a run tells while it goes. Displays, logs and metrics listen; the engine knows none of them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class WorkerName:
    """A worker's number in its run, and the node that it is on, once that is known."""

    number: int
    node: str | None = None

    def __str__(self) -> str:
        return f"worker {self.number}" if self.node is None else f"{self.node}/{self.number}"


@dataclass(frozen=True)
class Assignment:
    """What a worker works on: its method, and the layer if it is about one."""

    method: str
    layer: int | None = None

    def __str__(self) -> str:
        return self.method.replace("_", " ") + ("" if self.layer is None else f" {self.layer}")


class Progress(AbstractContextManager):
    """The silent one; the others say what happens."""

    def stage(self, name: str, total: int, done: int = 0) -> None:
        """A stage of ``total`` steps begins, of which an earlier run has ``done`` some; the one before has ended."""

    def advance(self) -> None:
        """One step of the stage is done."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def joining(self, worker: WorkerName) -> None:
        """Ray was asked for a worker, or restarts it."""

    def joined(self, worker: WorkerName) -> None:
        """A worker is up, with nothing to do yet."""

    def began(self, worker: WorkerName, assignment: Assignment) -> None:
        """A worker begins to work on something."""

    def ended(self, worker: WorkerName, assignment: Assignment, seconds: float) -> None:
        """A worker has done it, having been busy for so many seconds, and is idle unless it begins something else."""

    def lost(self, worker: WorkerName, assignment: Assignment | None) -> None:
        """A worker, or its node, is gone, with what it was working on."""

    def left(self, worker: WorkerName) -> None:
        """A worker was sent away: its device is too small, or its node is about to go."""

    def draining(self, worker: WorkerName, seconds: float | None) -> None:
        """A worker's node will be gone in so many seconds, if that is known; the worker takes no further calls."""

    def gave_up(self, worker: WorkerName, assignment: Assignment | None) -> None:
        """A worker gave up what it was working on, since its node goes before that ends; another repeats it."""

    def moved(self, size: int) -> None:
        """So many bytes of tensors went through the object store."""

    def __exit__(self, *error) -> None:
        pass


class Together(Progress):
    """Several that are all told the same."""

    def __init__(self, *parts: Progress):
        self._parts = parts

    def _tell(self, event: str, *details: Any) -> None:
        for part in self._parts:
            getattr(part, event)(*details)

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._tell("stage", name, total, done)

    def advance(self) -> None:
        self._tell("advance")

    def note(self, text: str) -> None:
        self._tell("note", text)

    def joining(self, worker: WorkerName) -> None:
        self._tell("joining", worker)

    def joined(self, worker: WorkerName) -> None:
        self._tell("joined", worker)

    def began(self, worker: WorkerName, assignment: Assignment) -> None:
        self._tell("began", worker, assignment)

    def ended(self, worker: WorkerName, assignment: Assignment, seconds: float) -> None:
        self._tell("ended", worker, assignment, seconds)

    def lost(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self._tell("lost", worker, assignment)

    def left(self, worker: WorkerName) -> None:
        self._tell("left", worker)

    def draining(self, worker: WorkerName, seconds: float | None) -> None:
        self._tell("draining", worker, seconds)

    def gave_up(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self._tell("gave_up", worker, assignment)

    def moved(self, size: int) -> None:
        self._tell("moved", size)
