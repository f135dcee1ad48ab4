"""A comparison from beginning to end: check, prepare, and one row a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from distprune.budgets import outer_parameters
from distprune.comparison.checking_runs import check_own_samples, check_room, check_runs, check_text
from distprune.comparison.runs import MethodOptions, Settings, list_runs, naming
from distprune.comparison.scoring import Evaluation, evaluate_apart
from distprune.config import PruneConfig
from distprune.engine import RunRecord, prune
from distprune.engine.driver import one_of_each_kind, worker_pool
from distprune.engine.run.preflight import Job
from distprune.engine.run.record import CALIBRATION_FILE, DrawReport
from distprune.engine.run.signals import sigterm_interrupts
from distprune.engine.scheduler.ray_cluster import WorkerPlan, alive_nodes, connected, plan_workers
from distprune.engine.scheduler.run_dtype import settle_dtype
from distprune.engine.stages.checking import Check, OwnSamples
from distprune.engine.stages.context import FirstStages
from distprune.engine.telemetry.process_memory import PeakMemory
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.weights import weight_access

#: Makes what tells how far one step of the comparison is.
NewProgress = Callable[[], Progress]


@dataclass(frozen=True)
class ComparisonRow:
    """One model. Sparsities are fractions, ``seconds`` are the pruning run's, and ``peak_memory`` is that of its most
    loaded process; the dense model, called "dense", has neither of these two."""

    method: str
    sparsity_asked: float
    sparsity_reached: float
    decoder_parameters: int
    total_parameters: int
    perplexity: float
    seconds: float | None = None
    peak_memory: PeakMemory | None = None


def compare(
    methods: Sequence[str],
    sparsities: Sequence[float],
    evaluation: Evaluation,
    common: Settings,
    *,
    config_file: Path | None = None,
    options: MethodOptions,
    keep: Path | None = None,
    progress: NewProgress = Progress,
    report: DrawReport | None = None,
) -> Iterator[ComparisonRow]:
    """Prune with every method at every sparsity, and give each row as soon as it is there, the dense model's first.

    Args:
        methods: names of methods.
        sparsities: fractions to remove.
        evaluation: what perplexity is taken on.
        common: options that are the same for all runs; without a calibration set, the model writes its own once.
        config_file: a YAML file with more of them.
        options: hyperparameters by method.
        keep: where the pruned checkpoints stay, as METHOD-PERCENT; otherwise each goes once it is evaluated.
        progress: makes what tells how far each step is.
        report: draws the report that each checkpoint that stays is made with.

    Raises:
        InputError: something about the input is wrong. What can be known before the long work is found before it.
        RuntimeError: a run failed otherwise; names the run.
    """
    with nullcontext(keep) if keep else TemporaryDirectory(prefix="distprune-compare-") as folder:
        runs = list_runs(methods, sparsities, common, config_file, options, Path(folder))
        dense, *jobs = check_runs(runs)
        check_text(evaluation, dense)
        if keep:
            check_room(jobs, keep)
        calibration = dense.config.calibration or Path(folder) / CALIBRATION_FILE
        if dense.config.calibration is None:
            check_own_samples(dense, calibration)
        with sigterm_interrupts(), connected(dense.config):
            workers = plan_workers(dense.config, alive_nodes(), dense.architecture.num_layers)
            prepare(dense, workers, calibration, progress())
            with naming("the dense model"):
                row = measure_dense(dense, evaluation, progress())
            yield row
            for number, run in enumerate(runs, 1):
                config = run.config.model_copy(update={"calibration": calibration})
                bar = progress()
                bar.note(f"{run.title} ({number} of {len(runs)})")
                with naming(run.title):
                    row = measure(run.name, config, evaluation, bar, progress(), report if keep else None)
                if not keep:
                    shutil.rmtree(config.output)
                yield row


def prepare(dense: Job, workers: WorkerPlan, calibration: Path, progress: Progress) -> None:
    """See that the weights are finite numbers and, where no calibration set was given, let the model write its own."""
    dense = dense.computed_in(settle_dtype(dense.config, dense.stored_dtype, workers))
    with (
        progress,
        weight_access(dense, workers) as model,
        worker_pool(dense, workers, model, progress) as pool,
    ):
        context = FirstStages(pool, progress, dense.architecture.num_layers)
        Check(context, one_of_each_kind(dense.architecture)).run()
        if dense.config.calibration is None:
            OwnSamples(context).run(calibration)


def measure_dense(dense: Job, evaluation: Evaluation, progress: Progress) -> ComparisonRow:
    """The row of the model as it came."""
    decoder = dense.target.dense
    return ComparisonRow(
        method="dense",
        sparsity_asked=0.0,
        sparsity_reached=0.0,
        decoder_parameters=decoder,
        total_parameters=decoder + outer_parameters(dense.architecture),
        perplexity=perplexity_of(dense.whole_folder(), evaluation, dense.config, progress),
    )


def measure(
    name: str,
    config: PruneConfig,
    evaluation: Evaluation,
    pruning: Progress,
    evaluating: Progress,
    report: DrawReport | None,
) -> ComparisonRow:
    """Prune and evaluate; the result stays at the configuration's output."""
    forget_peak_memory()
    record = prune(config, pruning, report=report)
    return ComparisonRow(
        method=name,
        sparsity_asked=config.sparsity,
        sparsity_reached=record.sparsity_reached(config.count_embeddings),
        decoder_parameters=record.decoder_parameters_after,
        total_parameters=record.total_parameters_after,
        perplexity=perplexity_of(config.output, evaluation, config, evaluating),
        seconds=round(sum(record.seconds.values()), 3),
        peak_memory=most_loaded(record),
    )


def perplexity_of(model: Path, evaluation: Evaluation, config: PruneConfig, progress: Progress) -> float:
    with progress:
        progress.stage("Evaluating", 1)
        perplexity = evaluate_apart(model, evaluation, config)
        progress.advance()
        progress.note(f"perplexity {perplexity:.2f}")
    return perplexity


def most_loaded(record: RunRecord) -> PeakMemory:
    """The largest of all processes' peaks, in host memory and on a GPU."""
    peaks = [record.peak_memory_driver, *record.peak_memory_workers]
    return PeakMemory(max(peak.resident for peak in peaks), max(peak.device for peak in peaks))


def forget_peak_memory() -> None:
    """Let this process's peak count from now on, so that a run isn't blamed for what came before it; on Linux."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
