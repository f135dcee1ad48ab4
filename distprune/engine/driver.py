"""A run from beginning to end: check, dense pass, plan, prune, assemble, verify, publish."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distprune.checkpoint import ShardWriter, copy_side_files, hold_lock, partial_directory, publish
from distprune.config import PruneConfig
from distprune.decoder_layer import DecoderLayer
from distprune.distillation import Lesson
from distprune.engine.assembly import assemble, layer_part, pruned_config
from distprune.engine.cluster import WorkerPlan, alive_nodes, connected, plan_workers
from distprune.engine.memory import peak_memory
from distprune.engine.pool import WorkerPool
from distprune.engine.preflight import Job, check_job
from distprune.engine.progress import Progress
from distprune.engine.record import CALIBRATION_FILE, OWN_FILES, RunRecord, layer_records, parameter_counts
from distprune.engine.stages import check_weights, distill_layers, prune_blocks, sweep, write_own_samples
from distprune.engine.tasks import Report
from distprune.engine.transport import unpack_all

# Seconds until a run says that it waits for its first worker.
PATIENCE = 30


def prune(config: PruneConfig, progress: Progress | None = None) -> RunRecord:
    """Prune a model and publish the result at ``config.output``.

    Work happens in ``OUTPUT.partial`` and becomes visible by one rename at the end; on an error nothing of it stays.

    Raises:
        InputError: something about the input is wrong; the output path is untouched.
    """
    progress = progress or Progress()
    job = check_job(config)
    with progress, work_directory(config.output) as folder, connected(config):
        workers = plan_workers(config, alive_nodes(), job.dense.num_hidden_layers)
        copy_model_files(job, folder)
        record = run_on_workers(job, workers, folder, progress)
        record.save(folder, config)
        publish(folder, config.output, config.overwrite)
    return record


@contextmanager
def work_directory(output: Path) -> Iterator[Path]:
    """A fresh ``OUTPUT.partial``, locked against other runs, that is gone afterwards unless it was published."""
    folder = partial_directory(output)
    with hold_lock(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def copy_model_files(job: Job, folder: Path) -> None:
    """The model's tokenizer, licence and the like; not what an earlier run left beside a model it made."""
    copy_side_files(job.model_path, folder)
    for name in OWN_FILES:
        (folder / name).unlink(missing_ok=True)


def run_on_workers(job: Job, workers: WorkerPlan, folder: Path, progress: Progress) -> RunRecord:
    """Everything that needs the workers, up to a verified checkpoint in ``folder``."""
    config, layers = job.config, job.dense.num_hidden_layers
    calibration = config.calibration or folder / CALIBRATION_FILE
    writer = ShardWriter(folder)
    reports: dict[int, Report] = {}
    lessons: dict[int, Lesson] = {}
    stage_seconds: dict[str, float] = {}

    def keep_layer(index: int, layer: DecoderLayer) -> None:
        writer.put(layer_part(index), job.family.layer_to_checkpoint(layer, index))

    def keep_pruned(index: int, layer: DecoderLayer, report: Report) -> None:
        keep_layer(index, layer)
        reports[index] = report
        for warning in report.warnings:
            progress.note(f"layer {index}: {warning}")

    def keep_distilled(index: int, layer: DecoderLayer, lesson: Lesson) -> None:
        keep_layer(index, layer)
        lessons[index] = lesson

    def pruned_layer(index: int) -> DecoderLayer:
        return job.family.layer_from_checkpoint(writer.read(layer_part(index)), pruned_config(job, plan), index)

    with worker_pool(job, workers, calibration, progress) as pool:
        with timed(stage_seconds, "check"):
            check_weights(pool, layers, progress)
        if config.calibration is None:
            with timed(stage_seconds, "own samples"):
                write_own_samples(pool, progress)
        with timed(stage_seconds, "dense pass"):
            boundaries, profiles = sweep(pool, layers, config.block_length(layers), progress)
        plan = job.method.plan(job.target, [unpack_all(profile) for profile in profiles], config.align)
        with timed(stage_seconds, "prune"):
            prune_blocks(pool, boundaries, plan, profiles, keep_pruned, progress)
        if config.distill:
            with timed(stage_seconds, "distill"):
                texts, ahead = config.distill.calibration, 2 * workers.count
                distill_layers(pool, layers, texts, ahead, pruned_layer, keep_distilled, progress)
        peaks = pool.peak_memory()

    progress.stage("Assembling", 1)
    with timed(stage_seconds, "assemble"):
        layout = assemble(job, plan, writer, folder)
        writer.discard()
    progress.advance()
    return RunRecord(
        model=config.model,
        method=config.method,
        options=job.method.model_dump(),
        layout=layout,
        sparsity_asked=config.sparsity,
        **parameter_counts(job.dense, plan),
        fingerprint=job.fingerprint(calibration),
        workers=workers.count,
        device=workers.device,
        peak_memory_driver=peak_memory(),
        peak_memory_workers=peaks,
        seconds=stage_seconds,
        layers=layer_records(job.dense, plan, reports, lessons),
    )


@contextmanager
def worker_pool(job: Job, workers: WorkerPlan, calibration: Path, progress: Progress) -> Iterator[WorkerPool]:
    pool = WorkerPool(workers, job.config, job.model_path.resolve(), calibration.resolve())
    try:
        if not pool.is_up(PATIENCE):
            wanted = f"{workers.cpus:g} CPUs and {workers.gpus:g} GPUs"
            progress.note(f"Waiting until the Ray cluster has {wanted} free for a worker ...")
        yield pool
    finally:
        pool.shutdown()


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 3)
