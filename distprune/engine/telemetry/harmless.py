"""What only watches a run (metrics, logs, displays) and never ends it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from distprune.engine.telemetry.progress import Progress, Together

_LOGGER = logging.getLogger("distprune")
_told: set[str] = set()


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Inside, an exception ends nothing else: it is logged, the first time that it comes from ``what``."""
    try:
        yield
    except Exception as error:
        if what not in _told:
            _told.add(what)
            _LOGGER.warning("%s can't be told of the run, which continues (%s: %s)", what, type(error).__name__, error)


class Unfailing(Together):
    """Passes on what a run tells to someone whose exceptions are no concern of the run's."""

    def __init__(self, what: str, make: Callable[[], Progress]):
        super().__init__()
        self._what = what
        with harmless(what):
            self._parts = (make(),)

    def _tell(self, event: str, *details: Any) -> None:
        with harmless(self._what):
            super()._tell(event, *details)

    def __enter__(self) -> Unfailing:
        self._tell("__enter__")
        return self

    def __exit__(self, *error: Any) -> None:
        self._tell("__exit__", *error)
