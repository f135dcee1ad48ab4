"""Doing steps one after another: each only if something that it depends on has changed, or its output is gone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic
from typing import Any

from distprune.engine.telemetry.log import RunLog
from distprune.errors import InputError, RunFailed
from distprune.pipeline.state import StepRecord, StepRecords
from distprune.pipeline.step import Step, Surroundings
from distprune.pipeline.summary import DONE, FAILED, INTERRUPTED, SKIPPED, UNCHANGED, WOULD_RUN, StepSummary

NEW, GONE, RESTARTED = "it was not done before", "its output is gone", "--restart"


class Execution:
    """What became of each step so far: ``steps`` in their order, and the ``results`` of those done, by name."""

    def __init__(self, records: StepRecords, surroundings: Surroundings, log: RunLog):
        self.steps: dict[str, StepSummary] = {}
        self.results: dict[str, Mapping[str, Any]] = {}
        self._records, self._surroundings, self._log = records, surroundings, log

    def reason(self, step: Step) -> str:
        """Why a step has to be done; empty where nothing has changed."""
        record = self._records.read(step.name)
        if self._surroundings.restart:
            return RESTARTED
        if record is None:
            return NEW
        if record.fingerprint != step.fingerprint:
            return f"changed: {', '.join(changes(record.inputs, step.inputs)) or 'distprune'}"
        return "" if step.is_there(record.result) else GONE

    def look(self, step: Step) -> None:
        """Note whether a step would be done."""
        reason = self.reason(step)
        self._note(StepSummary(step.name, WOULD_RUN if reason else UNCHANGED, 0.0, reason))

    def skip(self, step: Step, reason: str) -> None:
        self._note(StepSummary(step.name, SKIPPED, 0.0, reason))

    def do(self, step: Step) -> Mapping[str, Any]:
        """The result of a step, which is done if it has to be.

        Raises:
            InputError: the step's; names the step.
            RunFailed: likewise.
        """
        reason = self.reason(step)
        if not reason:
            result = self._records.read(step.name).result
            self._note(StepSummary(step.name, UNCHANGED, 0.0))
        else:
            self._tell(f"{step.name} ({reason})")
            began = monotonic()
            with self._failures_noted(step, began, reason):
                result = step.run(self._surroundings)
            seconds = round(monotonic() - began, 3)
            self._records.write(step.name, StepRecord(step.fingerprint, step.inputs, result, seconds))
            self._note(StepSummary(step.name, DONE, seconds, reason))
        self.results[step.name] = result
        return result

    @contextmanager
    def _failures_noted(self, step: Step, began: float, reason: str) -> Iterator[None]:
        def note(state: str) -> None:
            self._note(StepSummary(step.name, state, round(monotonic() - began, 3), reason))

        try:
            yield
        except KeyboardInterrupt:
            note(INTERRUPTED)
            raise
        except (InputError, RunFailed) as error:
            note(FAILED)
            raise type(error)(f"{step.name}: {error}") from error
        except BaseException:
            note(FAILED)
            raise

    def _note(self, step: StepSummary) -> None:
        self.steps[step.name] = step
        self._log.tell(f"step {step.state}", step=step.name, seconds=step.seconds, reason=step.reason)
        if step.state != DONE:
            self._tell(f"{step.name}: {step.state}")

    def _tell(self, text: str) -> None:
        self._surroundings.progress().note(text)


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The names of what differs."""
    return sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
