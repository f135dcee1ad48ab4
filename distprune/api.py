"""The Python API: one function a command, with the command line's names and defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from distprune.errors import InputError
from distprune.storage import local_folder, location

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from distprune.calibration import Calibration
    from distprune.comparison import ComparisonRow
    from distprune.config import PruneConfig
    from distprune.engine import RunRecord, RunStatus
    from distprune.engine.telemetry.progress import Progress
    from distprune.evaluation import ModelEvaluation, SpeedOptions
    from distprune.latency import LatencyTable
    from distprune.pipeline import PipelineConfig, PipelineSummary
    from distprune.planning import RunPlan
    from distprune.prune_options import PruneOptions

# Ray and the rest are imported when a function needs them, so that `import distprune` only registers the model class.


def calibrate(
    model: str,
    output: str | Path,
    *,
    text: Sequence[str] = (),
    field: str | None = None,
    samples: int = 128,
    sequence_length: int = 128,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    cover_experts: bool = False,
) -> Calibration:
    """Make a calibration set in Arrow, from texts in equal shares or, without any, from the model's own samples.

    Args:
        model: local Hugging Face folder, hub id or .gguf file.
        output: the Arrow file to write.
        text: text, JSON, JSONL, CSV, TSV or Parquet files, or names of Hugging Face datasets.
        field: the field of a record that holds its text, or the messages of its conversation.
        samples: windows in all.
        sequence_length: tokens of each.
        seed: seed of the choice of windows, or of the model's own samples.
        device: where the model writes its own samples.
        dtype: what it computes in then; "auto" is the checkpoint's, or float32 where the device has no units for that.
        cover_experts: add windows for experts of a mixture that the others seldom reach; needs ``text``.

    Raises:
        InputError: an option, file or text is unusable; names it and the fix.
    """
    from distprune.calibration import build_calibration
    from distprune.checkpoint import resolve_model

    return build_calibration(
        resolve_model(model, revision=revision),
        texts=text,
        field=field,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        output=location(output),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        cover_experts=cover_experts,
    )


@overload
def prune(run: PruneConfig, /, *, progress: Progress | bool | None = None) -> RunRecord: ...


@overload
def prune(
    model: str | None = None,
    output: str | Path | None = None,
    *,
    config: str | Path | None = None,
    progress: Progress | bool | None = None,
    **options: Unpack[PruneOptions],
) -> RunRecord: ...


def prune(
    model: PruneConfig | str | None = None,
    output: str | Path | None = None,
    *,
    config: str | Path | None = None,
    progress: Progress | bool | None = None,
    **options: Any,
) -> RunRecord:
    """Prune a model on Ray and write the result to ``output``.

    Args:
        model: local Hugging Face folder, hub id or .gguf file; or the whole run, as a
            :class:`distprune.PruneConfig` and with no option beside it.
        output: the folder to make.
        config: a YAML file of options; those given here override it.
        progress: True shows how far it is, False does not, and by default it is shown in notebooks; or what to tell.
        options: fields of :class:`distprune.PruneConfig`.

    Raises:
        InputError: the input is unusable; names it and the fix, and the output path is untouched.
    """
    from distprune.config import PruneConfig, load_config
    from distprune.engine import Requirements
    from distprune.engine import prune as run
    from distprune.planning import worker_needs
    from distprune.reporting import chosen_progress

    if isinstance(model, PruneConfig):
        if output is not None or config is not None or options:
            raise InputError("A PruneConfig is a whole run. Give no option beside it, or all options as keywords.")
        settings = model
    else:
        settings = load_config(None if config is None else Path(config), {"model": model, "output": output, **options})
    return run(settings, chosen_progress(progress), lambda *job: Requirements(*worker_needs(*job)), _draw_report)


def plan_from(
    library: str | Path,
    output: str | Path,
    *,
    progress: Progress | bool | None = None,
    **options: Unpack[PruneOptions],
) -> RunRecord:
    """Make another checkpoint from the library of a search, without solving again.

    Args:
        library: the folder that ``prune`` has made of it.
        output: the folder to make.
        progress: as for :func:`prune`.
        options: fields of :class:`distprune.PruneConfig` that are to be others than in the library's run, such as
            ``sparsity`` and ``target``, and ``model`` if it lies elsewhere now.

    Raises:
        InputError: the input is unusable; names it and the fix.
    """
    from distprune.config import load_config
    from distprune.engine import Library

    folder = location(library)
    given = {name: value for name, value in options.items() if value is not None}
    settings = {**Library.read(folder).settings, **given, "output": output, "from_library": folder}
    return prune(load_config(None, settings), progress=progress)


def plan(
    model: str | None = None,
    *,
    gpus: int = 0,
    nodes: int = 1,
    gpu_memory: str | int | None = None,
    host_memory: str | int | None = None,
    hardware: str | None = None,
    rates: Mapping[str, float] | None = None,
    config: str | Path | None = None,
    **options: Unpack[PruneOptions],
) -> RunPlan:
    """What a pruning run would take, from headers alone: memory, bytes, FLOPs, time, and whether it fits.

    Args:
        model: local Hugging Face folder, hub id (of which headers alone are fetched) or .gguf file.
        gpus: GPUs in all that are to be asked for; without any, the plan is for CPUs.
        nodes: machines that they are spread over.
        gpu_memory: of one GPU, such as "80GB" (the default).
        host_memory: of one node, such as "512GB". By default that of this machine, where the plan is for one node of
            CPUs; else it is not checked.
        hardware: "h100", "a100" or "cpu": whose rates to assume.
        rates: fields of :class:`distprune.planning.Rates` to replace.
        config: a YAML file of options of the run; those given here override it.
        options: fields of :class:`distprune.config.PruneConfig`.

    Raises:
        InputError: the input is unusable; names it and the fix.
    """
    from distprune.config import load_config
    from distprune.planning import describe_cluster, plan_run

    path = None if config is None else Path(config)
    # A plan writes nothing, so it may do without the one option that has no default.
    settings = load_config(path, {"output": "pruned", **options, "model": model})
    cluster = describe_cluster(gpus, nodes, gpu_memory, host_memory)
    return plan_run(settings, cluster, hardware=hardware, rates=rates)


def compare(
    model: str | None = None,
    *,
    methods: Sequence[str],
    sparsities: Sequence[float],
    text: str | Path,
    field: str | None = None,
    max_tokens: int | None = None,
    evaluation_length: int = 128,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    keep: str | Path | None = None,
    report: str | Path | None = None,
    config: str | Path | None = None,
    progress: Callable[[], Progress] | None = None,
    on_row: Callable[[ComparisonRow], None] | None = None,
    **common: Any,
) -> list[ComparisonRow]:
    """Prune a model with several methods at several sparsities, on one calibration set, and evaluate each result.

    Args:
        model: local Hugging Face folder, hub id or .gguf file.
        methods: names of methods.
        sparsities: fractions to remove.
        text: a file or data set to evaluate on, as :func:`calibrate` reads them.
        field: the field of a record that holds its text, or the messages of its conversation.
        max_tokens: use the text's first tokens only.
        evaluation_length: tokens of each window of the text.
        options: hyperparameters by method, such as ``{"olica": {"percdamp": 0.5}}``.
        keep: a folder where the pruned checkpoints stay, as METHOD-PERCENT.
        report: the HTML file to draw the rows in; by default report.html in ``keep``, if there is one.
        config: a YAML file of options that are common to all runs; those given here override it.
        progress: makes what tells how far each step is; silent by default.
        on_row: called with each row as soon as it is there, so that a failing run doesn't lose those before it.
        common: fields of :class:`distprune.config.PruneConfig`, the same for all runs. Where no calibration set is
            given, the model's own samples are drawn once.

    Returns:
        The dense model's row, and one for each method and sparsity.

    Raises:
        InputError: the input is unusable; names it and the fix.
        RuntimeError: a run failed; names it.
    """
    from distprune.comparison import Evaluation
    from distprune.comparison import compare as run
    from distprune.engine.telemetry.progress import Progress
    from distprune.reporting.pages.comparison_report import comparison_report

    kept = None if keep is None else local_folder(keep, "keep")
    with comparison_report(report, kept) as rows:
        for row in run(
            methods,
            sparsities,
            Evaluation(text, max_tokens, evaluation_length, field),
            {"model": model, **common},
            config_file=None if config is None else Path(config),
            options=options or {},
            keep=kept,
            progress=progress or Progress,
            report=_draw_report,
        ):
            rows.append(row)
            if on_row:
                on_row(row)
    return rows


def evaluate(
    models: str | Sequence[str],
    text: str | Path | None = None,
    *,
    field: str | None = None,
    tasks: Sequence[str] = (),
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    speed: bool | SpeedOptions = False,
    sequence_length: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "auto",
    workers: int | str | None = None,
    threads_per_worker: int = 1,
    gpus_per_worker: float | None = None,
    address: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> list[ModelEvaluation]:
    """Evaluate models, pruned or not, side by side: perplexity on a text, lm-eval's tasks, speed.

    Args:
        models: local Hugging Face folders, hub ids or .gguf files; the first is what the others are compared with.
        text: a file or data set that :func:`calibrate` reads too; its documents are joined by blank lines.
        field: the field of a record that holds its text, or the messages of its conversation.
        tasks: names or patterns of lm-eval's tasks.
        include_path: a folder of YAML files with further tasks.
        num_fewshot: examples before each question; by default each task's own number.
        limit: questions of each task, or the fraction of them where less than 1.
        speed: whether to measure speed and memory, each model in a process of its own on this machine.
        sequence_length: tokens of each window of the text.
        max_tokens: use the text's first tokens only.
        batch_size: windows, or requests of a task, in one forward pass.
        workers: spread each model's work over so many Ray actors, or "MIN:MAX" where the cluster is to grow, which all
            hold it; by default it is done here.
        threads_per_worker: CPU threads of each.
        gpus_per_worker: GPUs that each asks Ray for; 1 on "cuda" by default.
        address: the Ray cluster to join; by default RAY_ADDRESS, or a local one.
        revision: branch, tag or commit of those models that are on the hub.

    Returns:
        One evaluation a model, in their order.

    Raises:
        InputError: a model, the text, a task or an option is unusable. What can be known before weights are read is
            found before.
    """
    from distprune.checkpoint import is_hub_id, resolve_model
    from distprune.errors import InputError
    from distprune.evaluation import EvaluationOptions, Loading, SpeedOptions, evaluate_models

    names = [models] if isinstance(models, str) else list(models)
    options = EvaluationOptions(
        text=text,
        field=field,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        tasks=tuple(tasks),
        include_path=include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        speed=SpeedOptions() if speed is True else speed or None,
        loading=Loading(device, dtype, batch_size, trust_remote_code),
    )
    if not names:
        raise InputError("no model to evaluate; name at least one.")
    if text is None and not tasks and not options.speed:
        raise InputError("nothing to evaluate; give --text, --tasks or --speed.")
    if workers is None and address is not None:
        raise InputError(f"--address {address}: belongs to --workers, which is not given.")
    # A revision is of hub models; where there is none, it is refused as that of a folder.
    on_hub = {name for name in names if is_hub_id(name)} or set(names)
    found = [(name, resolve_model(name, revision=revision if name in on_hub else None)) for name in names]
    if workers is None:
        return evaluate_models(found, options)

    from distprune.engine.evaluators import spread, workers_asked_for

    asked = workers_asked_for(options.loading, workers, address, threads_per_worker, gpus_per_worker)
    return evaluate_models(found, options, spread(asked))


def measure_latency(
    model: str,
    output: str | Path,
    *,
    batch: Sequence[int] = (1,),
    prompt: int = 128,
    new: int = 32,
    prefill_weight: float = 1.0,
    rounds: int = 40,
    threads: int = 1,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    on_round: Callable[[int, int], None] | None = None,
) -> LatencyTable:
    """Measure on this machine what each part of a model's layers takes, for a run with the target "latency".

    Of the model nothing but its configuration is needed: weights are random.

    Args:
        model: local Hugging Face folder, hub id or .gguf file.
        output: the JSON file to write.
        batch: batch sizes, requests at a time; what is budgeted is the mean over them.
        prompt: tokens of a request's prompt.
        new: tokens that are made after it; with 0, decoding is left out.
        prefill_weight: how often the reading of the prompt counts; with 0, it is left out.
        rounds: times that each shape is measured; medians count.
        threads: of the CPU.
        device: "auto", "cpu", "cuda" or "cuda:1"; where the model will be served.
        dtype: what it will be served in; "auto" is the checkpoint's, or float32 where the device has no units for that.
        revision: branch, tag or commit of a hub model.
        on_round: told, after each round, how many of how many are done.

    Raises:
        InputError: an option or the model is unusable; names it and the fix.
    """
    from distprune.latency.measuring_latency import LatencyOptions
    from distprune.latency.model_latency import measure_model

    return measure_model(
        model,
        location(output),
        LatencyOptions(tuple(batch), prompt, new, prefill_weight, rounds, threads),
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        on_round=on_round or (lambda done, of: None),
    )


def pipeline(
    config: str | Path | PipelineConfig,
    *,
    restart: bool = False,
    dry_run: bool = False,
    progress: Callable[[], Progress] | None = None,
    on_summary: Callable[[PipelineSummary], None] | None = None,
) -> PipelineSummary:
    """Calibrate, prune at several sparsities, evaluate, and publish what passes a gate; nothing unchanged is repeated.

    Args:
        config: a YAML file, or what :func:`distprune.pipeline.load_pipeline` makes of one.
        restart: do every step anew.
        dry_run: check everything and tell which steps would be done, but do none.
        progress: makes what tells how far each step is; silent by default.
        on_summary: called once with the summary, however the pipeline ends; ``summary.json`` in its work folder has it
            too.

    Raises:
        InputError: the input is unusable; names it and the fix.
        GateFailed: no result is as good as the gate asks; nothing was published. Its ``summary`` tells why.
        RunFailed: workers, storage or a destination gave out; the same call resumes.
    """
    from distprune.engine.telemetry.progress import Progress
    from distprune.pipeline import load_pipeline, run_pipeline

    return run_pipeline(
        load_pipeline(Path(config)) if isinstance(config, str | Path) else config,
        restart=restart,
        dry_run=dry_run,
        progress=progress or Progress,
        on_summary=on_summary,
        report=_draw_report,
    )


def status(output: str | Path) -> RunStatus:
    """How far the run with that output is, whether it is alive or not.

    Raises:
        InputError: there is no such run.
    """
    from distprune.engine import status as find

    return find(location(output))


def inspect(directory: str | Path) -> RunRecord:
    """What was taken from which layer of a pruned checkpoint.

    Raises:
        InputError: the folder is not the result of a pruning run.
    """
    from distprune.engine import load_record

    return load_record(location(directory))


def card(
    directory: str | Path,
    evaluation: str | Path | Sequence[ModelEvaluation] = (),
    *,
    base_model: str | None = None,
) -> None:
    """Write the model card, README.md, of a pruned checkpoint anew.

    Args:
        directory: the result of a pruning run.
        evaluation: what :func:`evaluate` gave for the original and the result, or a file of what
            ``distprune evaluate --json`` printed.
        base_model: the original's id on the Hugging Face hub, for a run that had it from elsewhere.

    Raises:
        InputError: the folder is not the result of a pruning run, or the evaluation is unusable or of other models.
    """
    from distprune.engine import write_card

    write_card(location(directory), _evaluations(evaluation), base_model)


def report(
    directory: str | Path,
    evaluation: str | Path | Sequence[ModelEvaluation] = (),
    *,
    output: str | Path | None = None,
) -> Path:
    """Draw a run's report again, as a web page in one file.

    Args:
        directory: the result of a pruning run.
        evaluation: as of :func:`card`.
        output: the file to write; by default report.html in the checkpoint.

    Returns:
        The file.

    Raises:
        InputError: the folder is not the result of a pruning run, or one of the files is unusable.
    """
    from distprune.reporting.pages.run_report import draw_report

    return draw_report(location(directory), _evaluations(evaluation), None if output is None else location(output))


def _evaluations(given: str | Path | Sequence[ModelEvaluation]) -> Sequence[ModelEvaluation]:
    from distprune.evaluation import read_evaluations

    return read_evaluations(location(given)) if isinstance(given, str | Path) else given


def _draw_report(folder: Path) -> Path:
    """Draw the report of a run that is about to be published. What draws charts is imported now, and not before: it
    would count as the run's memory."""
    return report(folder)
