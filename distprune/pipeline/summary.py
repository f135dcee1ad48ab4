"""What a pipeline has come to, for a scheduler, a dashboard or a person: one object, and its JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from distprune.pipeline.gate import Miss

SUMMARY_FILE = "summary.json"
# Of a step; the last is what a dry run says.
DONE, UNCHANGED, SKIPPED, WOULD_RUN = "done", "unchanged", "skipped", "would run"
# Of a step and of a whole pipeline.
FAILED, INTERRUPTED = "failed", "interrupted"
# Of a whole pipeline.
PASSED, GATE_FAILED, BAD_INPUT, DRY_RUN = "passed", "gate failed", "bad input", "dry run"


@dataclass(frozen=True)
class StepSummary:
    """What became of a step, in how many seconds of this run, and why it was done or skipped."""

    name: str
    state: str
    seconds: float
    reason: str = ""


@dataclass(frozen=True)
class Figure:
    """A number of a model, and its ratio to the dense model's, where that is not zero."""

    value: float
    times_dense: float | None


@dataclass(frozen=True)
class ResultSummary:
    """A pruned checkpoint. Sparsities are fractions.

    Attributes:
        tasks: figures by task and metric.
        passed: whether the gate lets it through; None where it was not judged yet.
        misses: what the gate held against it.
        published: destinations where it now is.
    """

    percent: str
    checkpoint: str
    sparsity_asked: float
    sparsity_reached: float | None = None
    decoder_parameters: int | None = None
    total_parameters: int | None = None
    total_parameters_times_dense: float | None = None
    perplexity: Figure | None = None
    tasks: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    passed: bool | None = None
    misses: Sequence[Miss] = ()
    published: Sequence[str] = ()


@dataclass(frozen=True)
class PipelineSummary:
    """A whole pipeline.

    Attributes:
        state: "passed", "gate failed", "bad input", "failed", "interrupted" or "dry run".
        error: what ended it, if anything did.
        commit: of a hub model; None of a local one, or where the model was not found.
        started: UTC, ISO 8601.
        dense: the dense model's perplexity and scores.
    """

    model: str
    commit: str | None
    distprune: str
    state: str
    error: str | None
    started: str
    seconds: float
    steps: Sequence[StepSummary]
    dense: Mapping[str, Any] | None
    results: Sequence[ResultSummary]

    def to_json(self) -> str:
        """In one line; a number that is not finite is null, which JSON has."""
        return json.dumps(finite(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        whole = asdict(self)
        for written, result in zip(whole["results"], self.results, strict=True):
            for miss, found in zip(written["misses"], result.misses, strict=True):
                miss["message"] = str(found)
        return whole


def finite(value: Any) -> Any:
    """The same with None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def figure(value: float | None, dense: float | None) -> Figure | None:
    if value is None:
        return None
    return Figure(value, value / dense if dense else None)
