"""A pipeline's summary for the terminal."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from distprune.pipeline.gate import PERPLEXITY
from distprune.pipeline.summary import Figure, PipelineSummary, ResultSummary

UNKNOWN = "-"


def print_summary(console: Console, summary: PipelineSummary) -> None:
    """What became of each step, how each result fares, and why the gate holds back those that it does."""
    console.print(step_table(summary))
    if any(result.sparsity_reached is not None for result in summary.results):
        console.print(result_table(summary))
    for result in summary.results:
        for miss in result.misses:
            console.print(f"{result.percent}%: {miss}", highlight=False, markup=False)
        for destination in result.published:
            console.print(f"{result.percent}%: published at {destination}", highlight=False, markup=False)
    at = f" at commit {summary.commit}" if summary.commit else ""
    console.print(f"{summary.model}{at}: {summary.state}", highlight=False, markup=False)


def step_table(summary: PipelineSummary) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    table.add_column("step", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("seconds", justify="right")
    table.add_column("why")
    for step in summary.steps:
        table.add_row(step.name, step.state, f"{step.seconds:.1f}" if step.seconds else UNKNOWN, step.reason)
    return table


def result_table(summary: PipelineSummary) -> Table:
    """One row a result: sparsity, parameters, and each number beside its ratio to the dense model's."""
    metrics = list(dict.fromkeys(name for result in summary.results for name in figures_of(result)))
    table = Table(box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for column in ("asked", "reached", "parameters", *metrics, "gate"):
        table.add_column(column, justify="right")
    for result in summary.results:
        figures = figures_of(result)
        table.add_row(
            f"{result.percent}%",
            UNKNOWN if result.sparsity_reached is None else f"{result.sparsity_reached:.2%}",
            UNKNOWN if result.total_parameters is None else f"{result.total_parameters:,}",
            *(shown(figures.get(metric)) for metric in metrics),
            {True: "passes", False: "held back", None: UNKNOWN}[result.passed],
        )
    return table


def figures_of(result: ResultSummary) -> dict[str, Figure]:
    found = {} if result.perplexity is None else {PERPLEXITY: result.perplexity}
    return found | {
        f"{task} {name}": figure for task, scores in result.tasks.items() for name, figure in scores.items()
    }


def shown(figure: Figure | None) -> str:
    if figure is None:
        return UNKNOWN
    ratio = "" if figure.times_dense is None else f" ({figure.times_dense:.3f} times)"
    return f"{figure.value:.4g}{ratio}"
