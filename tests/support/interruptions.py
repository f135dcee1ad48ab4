"""Runs that end early, and workers that are lost at chosen moments."""

from __future__ import annotations

from distprune.engine.telemetry.progress import Progress


class Stops(Progress):
    """Interrupts a run after a number of steps of a stage, and notes what it is told."""

    def __init__(self, stage: str, steps: int, error: BaseException | None = None):
        self.wanted, self.steps, self.notes = stage, steps, []
        self.error = error or KeyboardInterrupt()

    def stage(self, name, total, done=0):
        self.name, self.done = name, 0
        self._stop_if_there()

    def advance(self):
        self.done += 1
        self._stop_if_there()

    def note(self, text):
        self.notes.append(text)

    def _stop_if_there(self):
        if self.name == self.wanted and self.done == self.steps:
            raise self.error


def first_of(chosen):
    """Whether an attempt is at the first of the chosen steps, as (kind, layer), of its call."""
    begun = set()

    def is_chosen(attempt) -> bool:
        if (attempt.task.kind(), attempt.task.layer) not in chosen or attempt.call in begun:
            return False
        begun.add(attempt.call)
        return True

    return is_chosen


def first_time_of(chosen):
    """Whether an attempt is at one of the chosen steps, as (kind, layer), that none has been before."""
    left = set(chosen)

    def is_chosen(attempt) -> bool:
        step = attempt.task.kind(), attempt.task.layer
        if step not in left:
            return False
        left.remove(step)
        return True

    return is_chosen
