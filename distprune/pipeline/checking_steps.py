"""Everything that can be known to be wrong with a pipeline before its long work begins."""

from __future__ import annotations

from pathlib import Path

from distprune.calibration.whole_model import check_sequence_length, load_config
from distprune.checkpoint.upload import local_path, scheme_of
from distprune.comparison.checking_runs import check_own_samples, check_room, check_runs
from distprune.comparison.runs import Run
from distprune.config import PruneConfig
from distprune.engine.run.preflight import overlap
from distprune.errors import InputError
from distprune.pipeline.calibrating import Calibrate
from distprune.pipeline.execution import Execution
from distprune.pipeline.measuring import check_measurable
from distprune.pipeline.plan import PipelinePlan
from distprune.pipeline.publishing import Publish
from distprune.pipeline.settings import EvaluateConfig, PipelineConfig
from distprune.storage import is_url, location


def check_pipeline(config: PipelineConfig, plan: PipelinePlan, execution: Execution) -> None:
    """See that every step that has to be done can be.

    Raises:
        InputError: one can't; names the option and how to fix it.
    """
    changed = {step.name for step in plan.steps() if execution.reason(step)}
    if changed & {plan.dense.name, *(result.evaluate.name for result in plan.results)}:
        check_evaluation(config.evaluate, plan.model.folder, config.trust_remote_code)
    for step in plan.calibrations:
        if step.name in changed:
            check_calibration(step)
    runs = [result.prune.config for result in plan.results if result.prune.name in changed]
    if runs:
        check_prunings([before_calibration(run, plan) for run in runs], config.work)
    for result in plan.results:
        for step in result.publish:
            if step.name in changed and (result.prune.name in changed or not step.is_published()):
                check_publishing(step, config)


def check_evaluation(settings: EvaluateConfig, model: Path, trust_remote_code: bool) -> None:
    """See that there is a text with a window that the model takes, and that the tasks and their data are there."""
    try:
        check_measurable(settings, model, trust_remote_code)
    except InputError as error:
        raise InputError(f"evaluate: {error}") from None


def check_calibration(step: Calibrate) -> None:
    """See that the model takes windows of this length, and can write its own samples if it has to."""
    model, trust = step.model.folder, step.base.trust_remote_code
    try:
        check_sequence_length(step.settings.sequence_length, load_config(model, trust), model)
    except InputError as error:
        raise InputError(f"{step.name}: {error}") from None
    if not step.settings.text:
        runs = [Run(step.name, step.own_samples().model_copy(update={"overwrite": True}))]
        check_own_samples(check_runs(runs)[0], step.output)


def before_calibration(run: PruneConfig, plan: PipelinePlan) -> PruneConfig:
    """The run as it can be checked while calibration sets that a step makes are not there: as if on own samples."""
    made = {step.output: step.settings for step in plan.calibrations}
    changes: dict[str, object] = {}
    if settings := made.get(run.calibration):
        sizes = {"samples": settings.samples, "sequence_length": settings.sequence_length}
        changes |= {"calibration": None, **sizes}
    if run.distill and run.distill.calibration in made:
        changes["distill"] = run.distill.model_copy(update={"calibration": None})
    return run.model_copy(update=changes)


def check_prunings(runs: list[PruneConfig], work: Path) -> None:
    """See that every run would be accepted, and that their results fit side by side."""
    _, *jobs = check_runs([Run(run.method, run) for run in runs])
    check_room(jobs, work)


def check_publishing(step: Publish, config: PipelineConfig) -> None:
    if scheme_of(step.destination) == "file":
        place = local_path(step.destination)
        model = location(config.model) if is_url(config.model) else Path(config.model).expanduser()
        for what, path in {"work": config.work.expanduser(), "model": model}.items():
            if overlap(path, place):
                raise InputError(
                    f"publish.to: '{step.destination}' is, holds or lies in {what} ({path}). Choose another place."
                )
    try:
        step.check()
    except InputError as error:
        raise InputError(f"publish: {error}") from None
