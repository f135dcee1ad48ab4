"""A pipeline from beginning to end: check, calibrate, evaluate, prune, evaluate, judge, publish, and sum up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from distprune.checkpoint import hold_lock, write_text
from distprune.engine.run.record import DrawReport
from distprune.engine.run.signals import sigterm_interrupts
from distprune.engine.telemetry.log import RunLog
from distprune.engine.telemetry.progress import Progress
from distprune.errors import GateFailed, InputError
from distprune.pipeline.checking_steps import check_pipeline
from distprune.pipeline.course import Course, sum_up
from distprune.pipeline.execution import Execution
from distprune.pipeline.gate import Miss, check_metrics, judge
from distprune.pipeline.measuring import Measured
from distprune.pipeline.plan import PipelinePlan, ResultPlan, plan_pipeline
from distprune.pipeline.settings import PipelineConfig
from distprune.pipeline.state import StepRecords
from distprune.pipeline.step import Surroundings
from distprune.pipeline.summary import (
    BAD_INPUT,
    DRY_RUN,
    FAILED,
    GATE_FAILED,
    INTERRUPTED,
    PASSED,
    SUMMARY_FILE,
    PipelineSummary,
)

# Why a result is not published.
NOT_PICKED, HELD_BACK = "another result was picked", "the gate holds it back"
#: Called once with the summary, however the pipeline ends.
OnSummary = Callable[[PipelineSummary], None]


def run_pipeline(
    config: PipelineConfig,
    *,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[], Progress] = Progress,
    on_summary: OnSummary | None = None,
    report: DrawReport | None = None,
) -> PipelineSummary:
    """Do all steps that have to be done, and publish what passes the gate.

    Args:
        config: the pipeline.
        restart: do every step anew.
        dry_run: check everything and tell which steps would be done, but do none.
        progress: makes what tells how far each step is; silent by default.
        on_summary: called once with the summary, however the pipeline ends.
        report: draws the report that each result is made with.

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
            if on_summary:
                on_summary(summary)
            if not dry_run and work.is_dir():
                write_text(work / SUMMARY_FILE, summary.to_json() + "\n")
            return summary

        try:
            passing = advance(course, work, restart, dry_run, progress, until_the_end, report)
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
    report: DrawReport | None,
) -> Sequence[ResultPlan]:
    """From the plan to what is published. Returns the results that pass the gate."""
    plan = course.plan = plan_pipeline(course.config)
    surroundings = Surroundings(plan.base, progress, restart, until_the_end, report)
    execution = course.execution = Execution(StepRecords(work / "steps"), surroundings, RunLog(str(work)))
    check_pipeline(course.config, plan, execution)
    if dry_run:
        for step in plan.steps():
            execution.look(step)
        return []
    passing = make_results(course, plan, execution)
    publish_results(course, plan, execution, passing)
    return passing


def make_results(course: Course, plan: PipelinePlan, execution: Execution) -> Sequence[ResultPlan]:
    """Prune, evaluate and judge. Returns the results that pass the gate."""
    gate = course.config.gate
    for step in plan.calibrations:
        execution.do(step)
    dense = Measured(**execution.do(plan.dense))
    check_metrics(gate, dense)
    for result in plan.results:
        execution.do(result.prune)
    for result in plan.results:
        course.misses[result.percent] = judge(gate, dense, Measured(**execution.do(result.evaluate)))
    return [result for result in plan.results if not course.misses[result.percent]]


def publish_results(course: Course, plan: PipelinePlan, execution: Execution, passing: Sequence[ResultPlan]) -> None:
    """Publish those of the results that pass that the configuration picks."""
    picked = pick(passing, course.config, execution.results)
    for result in plan.results:
        for step in result.publish:
            if result in picked:
                execution.do(step)
            else:
                execution.skip(step, NOT_PICKED if result in passing else HELD_BACK)


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
