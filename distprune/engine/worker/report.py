"""What a task tells besides its result: where its time went, and what its solvers warned of."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from distprune.errors import ConvergenceWarning


@dataclass(frozen=True)
class Report:
    """What a task tells besides its result: the seconds its steps took, and what did not go quite as it should."""

    seconds: dict[str, float]
    warnings: list[str]


@contextmanager
def convergence_warnings() -> Iterator[list[str]]:
    """Collects what solvers warn of inside, instead of printing it where nobody looks."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ConvergenceWarning)
        yield messages
    for warning in caught:
        if issubclass(warning.category, ConvergenceWarning):
            messages.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


class Stopwatch:
    """Seconds between laps, by name."""

    def __init__(self):
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self._last = now - self._last, now
