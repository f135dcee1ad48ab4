"""A run from beginning to end: check, dense pass, gradient pass, plan, prune, distil, assemble, verify, publish.

Only some methods have a gradient pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from distprune.calibration import open_calibration
from distprune.checkpoint import (
    Checkpoint,
    PartFolder,
    copy_side_files,
    failures_explained,
    hold_lock,
    partial_directory,
    publish,
)
from distprune.config import DistillConfig, PruneConfig
from distprune.engine.run.calibration_size import too_few_tokens
from distprune.engine.run.expert_tokens import seldom_used, tokens_by_layer
from distprune.engine.run.hub_output import goes_to_hub, prune_to_hub
from distprune.engine.run.journal import fingerprint
from distprune.engine.run.layer_files import PRUNED, LayerFiles
from distprune.engine.run.model_card import write_card
from distprune.engine.run.preflight import Job, check_job
from distprune.engine.run.record import (
    CALIBRATION_FILE,
    LOG_FILE,
    OWN_FILES,
    CalibrationRecord,
    DrawReport,
    RunRecord,
    forecast,
    layer_records,
    load_record,
    parameter_counts,
)
from distprune.engine.run.report_file import leave_report
from distprune.engine.run.signals import interruptions_noted, sigterm_interrupts
from distprune.engine.run.work_folder import CHECK, PUBLISHING, Outline, WorkFolder
from distprune.engine.scheduler.nodes import Requirements
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.ray_cluster import WorkerPlan, alive_nodes, connected, plan_workers
from distprune.engine.scheduler.run_dtype import settle_dtype
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.stages.assembling import Assemble, stored_bytes
from distprune.engine.stages.checking import Check, OwnSamples
from distprune.engine.stages.context import RunContext, layers_aiming, mixtures_of
from distprune.engine.stages.dense_pass import DensePass
from distprune.engine.stages.end_to_end import EndToEndDistillation
from distprune.engine.stages.gate_learning import GateLearning
from distprune.engine.stages.gradient_pass import GradientPass
from distprune.engine.stages.layerwise_distillation import LayerwiseDistillation
from distprune.engine.stages.pruned_passes import is_measured, kind_of_round, measure_again
from distprune.engine.stages.pruning_pass import PruningPass
from distprune.engine.telemetry.harmless import Unfailing
from distprune.engine.telemetry.log import RunLog, json_file
from distprune.engine.telemetry.metrics import RunMetrics
from distprune.engine.telemetry.process_memory import peak_memory
from distprune.engine.telemetry.progress import Progress, Together
from distprune.engine.worker.weights import WeightAccess, weight_access
from distprune.errors import InputError, InterruptedWhenDone, Unreachable
from distprune.hardware import AUTO
from distprune.latency import predict
from distprune.layers.architecture import Architecture
from distprune.methods import CostCurve, Plan, Profile
from distprune.storage import copy, kept_locally, staged
from distprune.version import __version__

#: What a worker of a run needs on a kind of device.
RequirementsOf = Callable[[PruneConfig, Checkpoint, str], Requirements]
# Seconds until a run says that it waits for its first worker.
PATIENCE = 30


def prune(
    config: PruneConfig,
    progress: Progress | None = None,
    requirements: RequirementsOf | None = None,
    report: DrawReport | None = None,
) -> RunRecord:
    """Prune a model and publish the result at ``config.output``.

    Work happens in ``OUTPUT.partial`` and becomes visible by one rename at the end. A run that ends before that leaves
    there what was done, and the same call resumes it.

    Args:
        config: the run.
        progress: what to tell how far it is; silent by default.
        requirements: tells what a worker needs, from the configuration, the model and the workers' device.
        report: draws the report that the result is published with.

    Raises:
        InputError: something about the input is wrong; the output path is untouched.
        RunFailed: workers or storage gave out; the same call resumes.
        KeyboardInterrupt: SIGINT or SIGTERM came; an InterruptedWhenDone, if the result was published by then.
    """
    if goes_to_hub(config):
        return prune_to_hub(config, lambda here: prune(here, progress, requirements, report))
    log, interruptions = RunLog(str(config.output)), []
    with sigterm_interrupts(), log.errors(), ExitStack() as at_last:

        def past_interruption() -> None:
            at_last.enter_context(interruptions_noted(interruptions))

        record = finish_publishing(config, past_interruption)
        if record is None:
            job = check_job(config)
            record = prune_job(job, progress or Progress(), log, requirements, report, past_interruption)
    if interruptions:
        raise InterruptedWhenDone(record)
    return record


def prune_job(
    job: Job,
    progress: Progress,
    log: RunLog,
    requirements: RequirementsOf | None,
    report: DrawReport | None,
    past_interruption: Callable[[], None],
) -> RunRecord:
    name, partial = str(job.config.output), partial_directory(job.config.output)
    with progress, failures_explained(partial), hold_lock(partial):
        with connected(job.config):
            workers = plan_workers(job.config, alive_nodes(), job.architecture.num_layers)
            dtype = settle_dtype(job.config, job.stored_dtype, workers)
            if job.config.dtype == AUTO and dtype.dtype != job.stored_dtype:
                progress.note(str(dtype))
            job = job.computed_in(dtype)
            config = job.config
            if requirements:
                workers = workers.requiring(requirements(config, job.checkpoint, workers.device))
            with work_folder(job, workers, progress) as work, logged(work), log.errors():
                log.run_began(config, resumed=work.resumed, dtype_reason=dtype.reason)
                with Unfailing("metrics", lambda: RunMetrics(name)) as metrics:
                    told = Together(progress, log, metrics)
                    for note in job.notes:
                        told.note(note)
                    record = run_on_workers(job, workers, work, told)
                log.run_done(record.seconds, record.decoder_sparsity, record.total_sparsity)
        record.save(work.checkpoint, config)
        write_card(work.checkpoint)
        copy(work.log, work.checkpoint / LOG_FILE)
        if report:
            leave_report(report, work.checkpoint, config.output)
        work.journal.write(PUBLISHING)
        past_interruption()
        publish(work.checkpoint, config.output, config.overwrite)
        work.clear_away()
    return record


@contextmanager
def logged(work: WorkFolder) -> Iterator[None]:
    """Inside, what happens is appended to the run's log. To an object nothing can be appended: it is copied back."""
    with kept_locally(work.log) as file, json_file(file):
        yield


def finish_publishing(config: PruneConfig, past_interruption: Callable[[], None]) -> RunRecord | None:
    """The record of a run that ended between publishing its result and clearing up, which is done now."""
    work = WorkFolder(partial_directory(config.output))
    # An output that is not to be overwritten can only have come from the run that left the folder.
    is_over = work.is_published() or (work.is_cleared() and not config.overwrite)
    if config.restart or not is_over or not config.output.is_dir():
        return None
    with hold_lock(work.folder):
        past_interruption()
        record = load_record(config.output)
        work.clear_away()
    return record


@contextmanager
def work_folder(job: Job, workers: WorkerPlan, progress: Progress) -> Iterator[WorkFolder]:
    """``OUTPUT.partial``, new or with what the same run has left there.

    Raises:
        InputError: another run has left something there.
    """
    config = job.config
    work = WorkFolder(partial_directory(config.output))
    if config.restart:
        work.remove()
    layers, distilled = job.architecture.num_layers, config.distill is not None
    outline = Outline(config.model, config.method, config.sparsity, layers, distilled, job.needs_gradients)
    if work.begin(job.identity(workers.device), outline):
        progress.note(f"Going on with what an earlier run has done in {work.folder}")
    try:
        yield work
    except InputError as error:
        if not (isinstance(error, Unreachable) and work.is_worth_keeping()):
            work.remove()
        raise
    except BaseException:
        if not work.is_worth_keeping():
            work.remove()
        raise


def run_on_workers(job: Job, workers: WorkerPlan, work: WorkFolder, progress: Progress) -> RunRecord:
    """Everything that needs the workers, up to a verified checkpoint in the work folder."""
    config, layers = job.config, job.architecture.num_layers
    calibration = config.calibration or work.checkpoint / CALIBRATION_FILE
    work.once("copy", lambda: copy_model_files(job, work.checkpoint))
    parts = work.writer.announce() if config.writes == "auto" else None
    with weight_access(job, workers) as model, worker_pool(job, workers, model, progress, parts) as pool:
        context = RunContext(
            pool,
            progress,
            layers,
            work.journal,
            config.block_length(layers),
            config.micro_batch,
            experts_at_once=config.experts_at_once,
            mixtures=mixtures_of(job.architecture.dense_shapes),
            aiming=layers_aiming(job.method, job.architecture.dense_shapes, config.experts_at_once is not None),
            rounds=config.rounds,
        )
        work.once(CHECK, Check(context, one_of_each_kind(job.architecture)).run)
        if config.calibration is None:
            work.once("own samples", lambda: OwnSamples(context).run(calibration))
        calibration_set = open_calibration(calibration)
        tokens = calibration_set.tokens
        with work.timed("dense pass"):
            profiles = DensePass(context, tokens, job.needs_gradients, job.learns_gates).run()
        if job.needs_gradients:
            with work.timed("gradient pass"):
                profiles = GradientPass(context, tokens).run()
        if job.learns_gates:
            with work.timed("gates"):
                profiles = GateLearning(context, job.method, job.target, tokens, profiles).run()
        expert_tokens = tokens_by_layer(profiles)
        plan = job.method.plan(job.target, profiles, config.align)
        notes = [*seldom_used(expert_tokens), *too_few_tokens(plan, tokens.size, job.architecture.hidden_size)]
        for note in notes:
            progress.note(note)
        files = prune_as_planned(context, job, plan, profiles, work)
        for number in range(2, config.rounds + 1):
            with work.timed("measure again"):
                profiles = measure_again(context, tokens, files.read, number)
            files.drop_pruned()
            plan = job.method.plan(job.target, profiles, config.align)
            files = prune_as_planned(context, job, plan, profiles, work, number)
        if config.distill:
            with work.timed("distill"):
                distill(context, config.distill, tokens, files)
        with work.timed("assemble"):
            layout, size = Assemble(context, job, plan, files, work.writer, work.checkpoint).run()
        peaks = pool.peak_memory()
    return RunRecord(
        model=config.model,
        method=config.method,
        options=job.method.model_dump(),
        layout=layout,
        sparsity_asked=config.sparsity,
        predicted_loss=plan.predicted_loss,
        gap=plan.gap,
        **parameter_counts(job.architecture, plan),
        fingerprint=fingerprint(job.identity(workers.device)),
        workers=workers.count,
        device=workers.device,
        dtype=config.dtype,
        peak_memory_driver=peak_memory(),
        peak_memory_workers=peaks,
        seconds=work.seconds(),
        layers=layer_records(
            job.architecture, plan, files.reports(), files.distillations(), expert_tokens, cost_curves(job, profiles)
        ),
        notes=[*job.notes, *notes],
        left_alone=job.left_alone.parts,
        left_alone_share=job.left_alone.share,
        commit=job.hub.commit if job.hub else None,
        calibration=CalibrationRecord.of(calibration_set),
        version=__version__,
        bytes_before=stored_bytes(job.checkpoint),
        bytes_after=size,
        latency=predict(job.target.latencies, plan) if job.target.latencies else None,
        zeroed=config.sparsity if job.method.zeroes else None,
    )


def prune_as_planned(
    context: RunContext, job: Job, plan: Plan, profiles: Sequence[Profile], work: WorkFolder, number: int = 1
) -> LayerFiles:
    """The pruning pass of a round, unless the next one has measured what it needs to know of it."""
    if plan.predicted_loss is not None:
        context.progress.note(forecast(plan.predicted_loss, plan.gap))
    is_last = number == job.config.rounds
    kind = PRUNED if is_last else kind_of_round("layer", number)
    files = LayerFiles(job, plan, work.writer, work.journal, context.progress, kind)
    if not is_measured(context, number + 1):
        with work.timed("prune" if number == 1 else "prune again"):
            PruningPass(context, plan, profiles, files.keep_pruned, is_last).run(files.pruned())
    return files


def cost_curves(job: Job, profiles: Sequence[Profile]) -> list[Mapping[str, CostCurve]]:
    """What the method's plan was made from, layer by layer."""
    shapes = job.architecture.dense_shapes
    return [job.method.cost_curves(shape, profile) for shape, profile in zip(shapes, profiles, strict=True)]


def one_of_each_kind(architecture: Architecture) -> list[int]:
    """Layer 0, and the first layer of every other kind."""
    first: dict[Hashable, int] = {}
    for index in range(architecture.num_layers):
        first.setdefault(architecture.kind(index), index)
    return list(first.values())


def distill(context: RunContext, options: DistillConfig, tokens: np.ndarray, files: LayerFiles) -> None:
    """The pruned layers learn, each alone or all together, from the pruning's tokens or from more of them."""
    if options.calibration is not None:
        tokens = open_calibration(options.calibration).tokens
    stage = EndToEndDistillation if options.objective == "logits" else LayerwiseDistillation
    stage(context, tokens, options, files.read, files.keep_distilled).run(files.distilled())


def copy_model_files(job: Job, folder: Path) -> None:
    """The model's tokenizer, licence and the like; not what an earlier run left beside a model it made."""
    with staged(folder) as local:
        copy_side_files(job.model_path, local, trust_remote_code=job.config.trust_remote_code)
        for name in OWN_FILES:
            (local / name).unlink(missing_ok=True)


@contextmanager
def worker_pool(
    job: Job, workers: WorkerPlan, model: WeightAccess, progress: Progress, parts: PartFolder | None = None
) -> Iterator[WorkerPool]:
    """Inside, workers are up. Those that see the folder of parts write what they have finished there."""
    pool = WorkerPool(RayRuntime(workers, job.config, model, parts), workers.count, progress, workers.requirements)
    try:
        if not pool.are_up(workers.least, PATIENCE):
            wanted = f"{workers.cpus:g} CPUs and {workers.gpus:g} GPUs free for "
            wanted += "a worker" if workers.least == 1 else f"each of {workers.least} workers"
            progress.note(f"Waiting until the Ray cluster has {wanted} ...")
            pool.are_up(workers.least, None)
        yield pool
    finally:
        pool.shutdown()
