"""A pipeline from beginning to end: check, calibrate, evaluate, prune, evaluate, judge, publish, and sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from time import monotonic
from typing import Any

from distprune.checkpoint import hold_lock, write_text
from distprune.engine.log import RunLog
from distprune.engine.progress import Progress
from distprune.engine.signals import sigterm_interrupts
from distprune.errors import GateFailed, InputError
from distprune.pipeline.checks import check_pipeline
from distprune.pipeline.config import PipelineConfig, percent
from distprune.pipeline.evaluation import Measured
from distprune.pipeline.execution import Execution
from distprune.pipeline.gate import Miss, check_metrics, judge
from distprune.pipeline.plan import PipelinePlan, ResultPlan, plan_pipeline
from distprune.pipeline.state import StepRecords
from distprune.pipeline.step import Surroundings
from distprune.pipeline.summary import (
    BAD_INPUT,
    DRY_RUN,
    FAILED,
    GATE_FAILED,
    INTERRUPTED,
    PASSED,
    SKIPPED,
    SUMMARY_FILE,
    PipelineSummary,
    ResultSummary,
    StepSummary,
    figure,
)
from distprune.version import __version__

# Why a step was skipped.
NOT_PICKED, HELD_BACK, NOT_REACHED = (
    "another result was picked",
    "the gate holds it back",
    "the pipeline ended before it",
)
#: Called once with the summary, however the pipeline ends.
OnSummary = Callable[[PipelineSummary], None]


@dataclass
class Course:
    """How far a pipeline has come."""

    config: PipelineConfig
    started: datetime = field(default_factory=lambda: datetime.now(timezone.utc))
    began: float = field(default_factory=monotonic)
    plan: PipelinePlan | None = None
    execution: Execution | None = None
    misses: dict[str, list[Miss]] = field(default_factory=dict)


def run_pipeline(
    config: PipelineConfig,
    *,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[], Progress] = Progress,
    on_summary: OnSummary | None = None,
) -> PipelineSummary:
    """Do all steps that have to be done, and publish what passes the gate.

    Args:
        config: the pipeline.
        restart: do every step anew.
        dry_run: check everything and tell which steps would be done, but do none.
        progress: makes what tells how far each step is; silent by default.
        on_summary: called once with the summary, however the pipeline ends.

    Raises:
        InputError: something about the input is wrong. What can be known before the long work is found before it.
        GateFailed: no result is good enough; nothing was published.
        RunFailed: workers, storage or a destination gave out; the same call resumes.
        KeyboardInterrupt: SIGINT or SIGTERM came; the same call resumes.
    """
    course, work = Course(config), config.work.expanduser().absolute()
    with ExitStack() as until_the_end:
        until_the_end.enter_context(sigterm_interrupts())
        if not dry_run:
            until_the_end.enter_context(hold_lock(work))

        def end(state: str, error: BaseException | None = None) -> PipelineSummary:
            summary = sum_up(course, state, str(error) or type(error).__name__ if error else None)
            if not dry_run and work.is_dir():
                write_text(work / SUMMARY_FILE, summary.to_json() + "\n")
            if on_summary:
                on_summary(summary)
            return summary

        try:
            passing = advance(course, work, restart, dry_run, progress, until_the_end)
        except InputError as error:
            end(BAD_INPUT, error)
            raise
        except KeyboardInterrupt:
            end(INTERRUPTED)
            raise
        except BaseException as error:
            end(FAILED, error)
            raise
        if passing or dry_run:
            return end(DRY_RUN if dry_run else PASSED)
        failure = GateFailed(refusal(course.misses), None)
        failure.summary = end(GATE_FAILED, failure)
        raise failure


def advance(
    course: Course,
    work: Path,
    restart: bool,
    dry_run: bool,
    progress: Callable[[], Progress],
    until_the_end: ExitStack,
) -> list[ResultPlan]:
    """From the plan to what is published. Returns the results that pass the gate."""
    config, records = course.config, StepRecords(work / "steps")
    plan = course.plan = plan_pipeline(config)
    surroundings = Surroundings(plan.base, progress, restart, until_the_end)
    execution = course.execution = Execution(records, surroundings, RunLog(str(work)))
    check_pipeline(config, plan, execution)
    if dry_run:
        for step in plan.steps():
            execution.look(step)
        return []
    for step in plan.calibrations:
        execution.do(step)
    dense = Measured(**execution.do(plan.dense))
    check_metrics(config.gate, dense)
    for result in plan.results:
        execution.do(result.prune)
    for result in plan.results:
        measured = Measured(**execution.do(result.evaluate))
        course.misses[result.percent] = judge(config.gate, dense, measured)
    passing = [result for result in plan.results if not course.misses[result.percent]]
    picked = pick(passing, config, execution.results)
    for result in plan.results:
        if result not in picked:
            for step in result.publish:
                execution.skip(step, NOT_PICKED if result in passing else HELD_BACK)
    for result in picked:
        for step in result.publish:
            execution.do(step)
    return passing


def pick(
    passing: Sequence[ResultPlan], config: PipelineConfig, done: Mapping[str, Mapping[str, Any]]
) -> Sequence[ResultPlan]:
    """Those of the results that pass that are to be published."""
    if not (passing and config.publish):
        return []
    match config.publish.which:
        case "smallest":
            return [min(passing, key=lambda result: done[result.prune.name]["total_parameters"])]
        case "best":
            return [min(passing, key=lambda result: done[result.evaluate.name]["perplexity"])]
    return passing


def refusal(misses: Mapping[str, Sequence[Miss]]) -> str:
    reasons = "; ".join(f"at {name}%, {', '.join(map(str, found))}" for name, found in misses.items())
    return f"no result passes the gate, so nothing is published: {reasons}. Prune less, or change the gate."


# ------------------------------------------------------------------ the summary


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
        summary = replace(
            summary,
            sparsity_reached=pruned["total_sparsity" if config.count_embeddings else "decoder_sparsity"],
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
