"""What an evaluation found, for people to read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from distprune.evaluation import BatchSpeed, ModelEvaluation

MIB = 2**20
STDERR = "_stderr"
MEMORY_COLUMNS = ("parameters, MiB", "peak, MiB", "KV cache, bytes/token")
SPEED_COLUMNS = ("prefill, tokens/s", "decode, tokens/s")


def evaluation_lines(evaluations: Sequence[ModelEvaluation]) -> Iterator[Table | str]:
    """Tables with a column a model for quality, and a row a model for memory and speed.

    In brackets is how the others compare with the first: differences of metrics, multiples of all else.
    """
    names = [evaluation.model for evaluation in evaluations]
    results = [evaluation.perplexity for evaluation in evaluations]
    if any(results) or any(evaluation.tasks for evaluation in evaluations):
        yield quality_table(names, evaluations)
    if results[0]:
        first = results[0]
        yield (
            f"perplexity on {first.tokens} tokens ({first.windows} windows of {first.sequence_length}, in "
            f"{first.dtype}, {' and '.join(f'{result.seconds:.1f}' for result in results)} s)"
        )
    if all(evaluation.speed for evaluation in evaluations):
        yield memory_table(names, evaluations)
        for number, speed in enumerate(evaluations[0].speed.batches):
            yield speed_table(names, [evaluation.speed.batches[number] for evaluation in evaluations], speed.batch)


def quality_table(names: Sequence[str], evaluations: Sequence[ModelEvaluation]) -> Table:
    """A row for perplexity, and one for each task's metrics with their standard error, where it has one."""
    return filled(table_of("", "", *names), quality_rows(evaluations))


def quality_rows(evaluations: Sequence[ModelEvaluation]) -> Iterator[tuple[str, ...]]:
    if all(evaluation.perplexity for evaluation in evaluations):
        values = [evaluation.perplexity.perplexity for evaluation in evaluations]
        yield "perplexity", *(f"{value:.2f}" + ratio(value, values) for value in values)
    for task, metrics in evaluations[0].tasks.items():
        for metric in metrics:
            if STDERR not in metric:
                cells = (metric_cell(task, metric, evaluation, evaluations[0]) for evaluation in evaluations)
                yield f"{task}, {metric}", *cells


def metric_cell(task: str, metric: str, evaluation: ModelEvaluation, first: ModelEvaluation) -> str:
    metrics = evaluation.tasks[task]
    name, comma, filtered = metric.partition(",")
    error = metrics.get(name + STDERR + comma + filtered)
    value = f"{metrics[metric]:.4f}" + ("" if error is None else f" ± {error:.4f}")
    return value if evaluation is first else f"{value} ({metrics[metric] - first.tasks[task][metric]:+.4f})"


def memory_table(names: Sequence[str], evaluations: Sequence[ModelEvaluation]) -> Table:
    """Memory of the parameters, of the whole process, and of one token in the KV cache."""
    title = f"memory, in {evaluations[0].speed.dtype}"
    return filled(table_of_models(title, *MEMORY_COLUMNS), memory_rows(names, evaluations))


def memory_rows(names: Sequence[str], evaluations: Sequence[ModelEvaluation]) -> Iterator[tuple[str, ...]]:
    speeds = [evaluation.speed for evaluation in evaluations]
    parameters, peaks = ([getattr(speed, field) for speed in speeds] for field in ("parameter_bytes", "peak_bytes"))
    cached = [speed.cache_bytes_per_token for speed in speeds]
    for name, parameter, peak, cache in zip(names, parameters, peaks, cached, strict=True):
        yield (
            name,
            f"{parameter / MIB:,.0f}" + ratio(parameter, parameters),
            f"{peak / MIB:,.0f}" + ratio(peak, peaks),
            f"{cache:,.0f}" + ratio(cache, cached),
        )


def speed_table(names: Sequence[str], speeds: Sequence[BatchSpeed], batch: int) -> Table:
    """Tokens a second at one batch size."""
    return filled(table_of_models(f"batch {batch}", *SPEED_COLUMNS), speed_rows(names, speeds))


def speed_rows(names: Sequence[str], speeds: Sequence[BatchSpeed]) -> Iterator[tuple[str, ...]]:
    for name, speed in zip(names, speeds, strict=True):
        prefill, decode = (f"{speed.prefill:,.0f}", speed.prefill_ratio), (f"{speed.decode:,.0f}", speed.decode_ratio)
        yield name, *(f"{value} ({against:.2f})" for value, against in (prefill, decode))


def ratio(value: float, values: Sequence[float]) -> str:
    """As a multiple of the first, where there are others."""
    return f" ({value / values[0]:.2f})" if len(values) > 1 and values[0] else ""


def table_of(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD)
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def table_of_models(title: str, *columns: str) -> Table:
    """A table with a row a model, whose name folds where it would leave numbers no room."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    table.add_column("model", overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def filled(table: Table, rows: Iterable[tuple[str, ...]]) -> Table:
    for row in rows:
        table.add_row(*row)
    return table
