"""What happened in a run and when: records of the standard logging, one JSON object a line.

They go to the logger "distprune.run", to which anyone may add handlers, and, with the package's other records, to a
file in the run's work folder, which a resumed run appends to, and which becomes a part of the result.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any, TextIO

from distprune.config import PruneConfig
from distprune.engine.telemetry.harmless import harmless
from distprune.engine.telemetry.progress import Assignment, Progress, WorkerName
from distprune.version import __version__

PACKAGE = logging.getLogger("distprune")
# What a run tells is for those alone who ask for it; it is much, and people are told by the progress.
LOGGER = PACKAGE.getChild("run")
LOGGER.propagate = False
LOGGER.setLevel(logging.INFO)
LOGGER.addHandler(logging.NullHandler())


class JsonFormatter(logging.Formatter):
    """Time in UTC, level, event and run; then what belongs to the event."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds")
        known = {"time": time, "level": record.levelname.lower(), "event": record.getMessage()}
        return json.dumps(known | getattr(record, "fields", {}))


@contextmanager
def json_lines(stream: TextIO) -> Iterator[None]:
    """Inside, every record is a line of the stream."""
    with _handled_by(_Stream(stream)):
        yield


@contextmanager
def json_file(path: Path) -> Iterator[None]:
    """Inside, every record is appended to the file. A line that an earlier process was torn off in is cut away."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)
    # Warnings that nobody handles are shown on stderr, and go on being shown there.
    unhandled = not PACKAGE.hasHandlers()
    with _handled_by(_File(path, encoding="utf-8")):
        if unhandled:
            PACKAGE.addHandler(logging.lastResort)
        try:
            yield
        finally:
            PACKAGE.removeHandler(logging.lastResort)


@contextmanager
def _handled_by(handler: logging.Handler) -> Iterator[None]:
    handler.setFormatter(JsonFormatter())
    for logger in (PACKAGE, LOGGER):
        logger.addHandler(handler)
    try:
        yield
    finally:
        for logger in (PACKAGE, LOGGER):
            logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()


class _File(logging.FileHandler):
    """What can't be written is left out: a full disk is for the run itself to tell of."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class _Stream(logging.StreamHandler):
    """What can't be written is left out, which is told once, to whom the package's warnings go."""

    _failed = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self._failed:
            self._failed = True
            PACKAGE.warning("the log can't be written (%s)", sys.exc_info()[1])


class RunLog(Progress):
    """Logs what a run tells, under the run's name."""

    def __init__(self, run: str):
        self._run = run
        self._stage, self._left, self._began = "", 0, monotonic()
        self._told: BaseException | None = None

    def tell(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        with harmless("the log"):
            LOGGER.log(level, event, extra={"fields": {"run": self._run, **fields}})

    def run_began(self, config: PruneConfig, resumed: bool, dtype_reason: str) -> None:
        with harmless("the log"):
            settings = config.model_dump(mode="json", include={"model", "method", "sparsity", "workers", "dtype"})
            event = "run resumed" if resumed else "run started"
            self.tell(event, **settings, dtype_reason=dtype_reason, distprune=__version__)

    def run_done(self, seconds: Mapping[str, float], decoder_sparsity: float, total_sparsity: float) -> None:
        self.tell("run done", decoder_sparsity=decoder_sparsity, total_sparsity=total_sparsity, seconds=dict(seconds))

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Logs what is raised inside; once, where one is inside another."""
        try:
            yield
        except BaseException as error:
            if error is not self._told:
                self._told = error
                event = "interrupted" if isinstance(error, KeyboardInterrupt) else "error"
                self.tell(event, logging.ERROR, kind=type(error).__name__, message=str(error))
            raise

    def stage(self, name: str, total: int, done: int = 0) -> None:
        self._stage, self._left, self._began = name, total - done, monotonic()
        self.tell("stage began", stage=name, steps=total, done_before=done)

    def advance(self) -> None:
        self._left -= 1
        if self._left == 0:
            self.tell("stage done", stage=self._stage, seconds=round(monotonic() - self._began, 3))

    def note(self, text: str) -> None:
        self.tell("note", text=text)

    def joining(self, worker: WorkerName) -> None:
        self.tell("worker asked for", worker=worker.number)

    def joined(self, worker: WorkerName) -> None:
        self.tell("worker up", **place(worker))

    def began(self, worker: WorkerName, assignment: Assignment) -> None:
        self.tell("call started", stage=self._stage, **call(assignment), **place(worker))

    def ended(self, worker: WorkerName, assignment: Assignment, seconds: float) -> None:
        self.tell("call ended", stage=self._stage, **call(assignment), **place(worker), seconds=round(seconds, 6))

    def lost(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self.tell("worker lost", logging.WARNING, **(call(assignment) if assignment else {}), **place(worker))

    def left(self, worker: WorkerName) -> None:
        self.tell("worker sent away", logging.WARNING, **place(worker))

    def draining(self, worker: WorkerName, seconds: float | None) -> None:
        left = None if seconds is None else round(seconds, 1)
        self.tell("worker draining", logging.WARNING, **place(worker), seconds_left=left)

    def gave_up(self, worker: WorkerName, assignment: Assignment | None) -> None:
        self.tell("call given up", logging.WARNING, **(call(assignment) if assignment else {}), **place(worker))


def place(worker: WorkerName) -> dict[str, Any]:
    return {"worker": worker.number, "node": worker.node}


def call(assignment: Assignment) -> dict[str, Any]:
    return {"call": assignment.method, "layer": assignment.layer}
