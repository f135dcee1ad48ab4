"""What a pipeline has done so far, on disk: a step that depends on nothing new is not repeated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distprune.checkpoint import write_text


@dataclass(frozen=True)
class StepRecord:
    """A step that was done: all that its result depends on, and the result, both as JSON gives them back."""

    fingerprint: str
    inputs: Mapping[str, Any]
    result: Mapping[str, Any]
    seconds: float


class StepRecords:
    """One JSON file a step, ``STEP.json``, which is there wholly or not at all."""

    def __init__(self, folder: Path):
        self._folder = folder

    def read(self, step: str) -> StepRecord | None:
        """The record of a step; None where it was not done, or another version of distprune wrote another form."""
        try:
            return StepRecord(**json.loads(self._file(step).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def write(self, step: str, record: StepRecord) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text(self._file(step), json.dumps(asdict(record), indent=2) + "\n")

    def _file(self, step: str) -> Path:
        return self._folder / f"{step}.json"
