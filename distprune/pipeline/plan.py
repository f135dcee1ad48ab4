"""A pipeline's steps, all known before the first is done."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distprune.calibration import open_calibration
from distprune.config import PruneConfig, load_config
from distprune.latency import LatencyTable
from distprune.pipeline.calibrating import Calibrate, plan_calibration
from distprune.pipeline.evaluate_step import Evaluate, plan_evaluation
from distprune.pipeline.pruning import Prune
from distprune.pipeline.publishing import Publish
from distprune.pipeline.settings import CalibrationConfig, PipelineConfig, percent
from distprune.pipeline.settled_model import SettledModel, settle
from distprune.pipeline.step import Step


@dataclass(frozen=True)
class ResultPlan:
    """The steps of one sparsity. Whether it is published, the gate decides."""

    percent: str
    prune: Prune
    evaluate: Evaluate
    publish: tuple[Publish, ...]


@dataclass(frozen=True)
class PipelinePlan:
    """All steps, in the order in which they are done: what may fail early comes early."""

    model: SettledModel
    base: PruneConfig
    calibrations: tuple[Calibrate, ...]
    dense: Evaluate
    results: tuple[ResultPlan, ...]

    def steps(self) -> Iterator[Step]:
        yield from self.calibrations
        yield self.dense
        yield from (result.prune for result in self.results)
        yield from (result.evaluate for result in self.results)
        for result in self.results:
            yield from result.publish


@dataclass(frozen=True)
class CalibrationSet:
    """A set that a pruning run reads: its file, what decides its content, and the step that makes it, if one does."""

    path: Path | None
    origin: str | None
    step: Calibrate | None = None


def plan_pipeline(config: PipelineConfig) -> PipelinePlan:
    """Settle on the model and on everything else that is read.

    Raises:
        InputError: something that is to be read does not exist.
    """
    work = config.work.expanduser().absolute()
    base = base_config(config, work)
    model = settle(base)
    base = base.model_copy(update={"revision": model.commit})
    calibration = calibration_set("calibrate", work / "calibration.arrow", config.calibration, model, base)
    distillation = calibration_set(
        "calibrate-distill", work / "distillation.arrow", config.distill_calibration(), model, base
    )
    results = tuple(
        plan_result(config, work, sparsity, base, model, calibration, distillation) for sparsity in config.sparsities
    )
    dense = plan_evaluation("evaluate-dense", model.whole_folder, model.identity, config.evaluate)
    steps = tuple(found.step for found in (calibration, distillation) if found.step)
    return PipelinePlan(model, base, steps, dense, results)


def base_config(config: PipelineConfig, work: Path) -> PruneConfig:
    """What all pruning runs have in common."""
    common = {"model": config.model, "revision": config.revision, "address": config.address}
    trust = config.trust_remote_code
    return load_config(None, {**config.prune, **common, "trust_remote_code": trust, "output": work / "pruned"})


def calibration_set(
    name: str, output: Path, settings: CalibrationConfig | None, model: SettledModel, base: PruneConfig
) -> CalibrationSet:
    if settings is None:
        return CalibrationSet(None, None)
    if settings.file is not None:
        return CalibrationSet(settings.file, open_calibration(settings.file).fingerprint)
    step = plan_calibration(name, output, settings, model, base)
    return CalibrationSet(output, step.fingerprint, step)


def plan_result(
    config: PipelineConfig,
    work: Path,
    sparsity: float,
    base: PruneConfig,
    model: SettledModel,
    calibration: CalibrationSet,
    distillation: CalibrationSet,
) -> ResultPlan:
    name, folder = percent(sparsity), work / f"pruned-{percent(sparsity)}"
    own: dict[str, Any] = {"sparsity": sparsity, "output": folder, "overwrite": True, "calibration": calibration.path}
    if config.distill:
        options = config.distill.model_dump(exclude={"calibration"})
        own["distill"] = {**options, "calibration": distillation.path}
    run = PruneConfig.model_validate(base.model_dump() | own)
    reads = {
        "model": model.identity,
        "calibration": calibration.origin,
        "distillation's texts": distillation.origin,
        "latencies": run.latency_table and LatencyTable.read(run.latency_table).fingerprint,
    }
    prune = Prune(f"prune-{name}", run, run.decisive() | reads)
    evaluate = plan_evaluation(f"evaluate-{name}", lambda: folder, prune.fingerprint, config.evaluate)
    return ResultPlan(name, prune, evaluate, tuple(plan_publishing(config, name, folder, prune)))


def plan_publishing(config: PipelineConfig, name: str, folder: Path, prune: Prune) -> Iterator[Publish]:
    for template in config.publish.to if config.publish else ():
        destination, private = template.format(percent=name), config.publish.private
        mark = hashlib.sha256(destination.encode()).hexdigest()[:8]
        inputs = {"checkpoint": prune.fingerprint, "destination": destination, "private": private}
        yield Publish(
            f"publish-{name}-{mark}",
            folder,
            destination,
            config.publish.overwrite,
            private,
            config.publish.hub_ignore,
            inputs,
        )
