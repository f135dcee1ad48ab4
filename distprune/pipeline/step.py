"""A step of a pipeline: what its result depends on, how it is done, and whether its output is still there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from distprune.config import PruneConfig
from distprune.engine.run.journal import fingerprint
from distprune.engine.run.record import DrawReport
from distprune.engine.scheduler.ray_cluster import connected
from distprune.engine.telemetry.progress import Progress
from distprune.version import __version__


@dataclass
class Surroundings:
    """What steps share: the Ray that the first one that needs it joins, what tells of each one's progress, and what
    draws the report of each pruning run."""

    base: PruneConfig
    progress: Callable[[], Progress]
    restart: bool
    until_the_end: ExitStack
    report: DrawReport | None = None
    is_connected: bool = False

    def connect(self) -> None:
        """Join Ray, or start one, for the rest of the pipeline."""
        if not self.is_connected:
            self.until_the_end.enter_context(connected(self.base))
            self.is_connected = True


class Step(ABC):
    """One step. ``name`` is a file's name too.

    ``inputs`` is all that the result depends on, as JSON: values, digests of what is read, and the fingerprints of the
    steps that made it. So it is known before any step is done, and a step that changes changes all that follow from it.
    """

    name: str
    inputs: Mapping[str, Any]

    @property
    def fingerprint(self) -> str:
        return fingerprint({**self.inputs, "distprune": __version__})

    @abstractmethod
    def run(self, surroundings: Surroundings) -> dict[str, Any]:
        """Do it, resuming what an earlier attempt has left. Returns the result, as JSON.

        Raises:
            InputError: something about its input is wrong.
            RunFailed: workers or storage gave out; the next attempt resumes.
        """

    @abstractmethod
    def is_there(self, result: Mapping[str, Any]) -> bool:
        """Whether what an earlier run gave that result for still exists."""
