"""How far a pipeline has come, and the summary of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from time import monotonic
from typing import Any

from distprune.pipeline.execution import Execution
from distprune.pipeline.gate import Miss
from distprune.pipeline.plan import PipelinePlan, ResultPlan
from distprune.pipeline.settings import PipelineConfig, percent
from distprune.pipeline.summary import SKIPPED, PipelineSummary, ResultSummary, StepSummary, figure
from distprune.version import __version__

NOT_REACHED = "the pipeline ended before it"


@dataclass
class Course:
    """What is known so far: plan and execution as soon as there are any, and what the gate found by sparsity."""

    config: PipelineConfig
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    began: float = field(default_factory=monotonic)
    plan: PipelinePlan | None = None
    execution: Execution | None = None
    misses: dict[str, list[Miss]] = field(default_factory=dict)


def sum_up(course: Course, state: str, error: str | None) -> PipelineSummary:
    config, plan, execution = course.config, course.plan, course.execution
    done = execution.results if execution else {}
    return PipelineSummary(
        model=config.model,
        commit=plan.model.commit if plan else None,
        distprune=__version__,
        state=state,
        error=error,
        started=course.started.isoformat(timespec="seconds"),
        seconds=round(monotonic() - course.began, 3),
        steps=steps_of(plan, execution) if plan and execution else [],
        dense=done.get(plan.dense.name) if plan else None,
        results=[result_of(course, result, done) for result in plan.results] if plan else [],
    )


def steps_of(plan: PipelinePlan, execution: Execution) -> list[StepSummary]:
    """All steps in their order; those that the pipeline did not come to are skipped."""
    return [
        execution.steps.get(step.name) or StepSummary(step.name, SKIPPED, 0.0, NOT_REACHED) for step in plan.steps()
    ]


def result_of(course: Course, result: ResultPlan, done: Mapping[str, Mapping[str, Any]]) -> ResultSummary:
    config = result.prune.config
    summary = ResultSummary(percent(config.sparsity), str(config.output), config.sparsity)
    if pruned := done.get(result.prune.name):
        removed = pruned["total_sparsity" if config.count_embeddings else "decoder_sparsity"]
        zeroed = pruned.get("zeroed")
        summary = replace(
            summary,
            sparsity_reached=removed if zeroed is None else zeroed,
            decoder_parameters=pruned["decoder_parameters"],
            total_parameters=pruned["total_parameters"],
            total_parameters_times_dense=pruned["total_parameters"] / pruned["total_parameters_dense"],
        )
    if result.evaluate.name in done:
        dense, measured = (done[step.name] for step in (course.plan.dense, result.evaluate))
        summary = replace(
            summary,
            perplexity=figure(measured["perplexity"], dense["perplexity"]),
            tasks={
                task: {name: figure(value, dense["tasks"][task].get(name)) for name, value in scores.items()}
                for task, scores in measured["tasks"].items()
            },
        )
    if result.percent in course.misses:
        misses = course.misses[result.percent]
        summary = replace(summary, passed=not misses, misses=misses)
    published = [step.destination for step in result.publish if step.name in done]
    return replace(summary, published=published)
