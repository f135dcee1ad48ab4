"""Quality, speed and size of models that were evaluated side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distprune.evaluation import ModelEvaluation
from distprune.reporting.evaluation_tables import (
    MEMORY_COLUMNS,
    SPEED_COLUMNS,
    STDERR,
    memory_rows,
    quality_rows,
    speed_rows,
)
from distprune.reporting.pages.rendering import ABOVE, Chart, HtmlTable, plain_figure

#: Of a task's metrics the first of these that it has is drawn.
DRAWN_METRICS = ("acc_norm", "acc", "exact_match")


def evaluation_tables(evaluations: Sequence[ModelEvaluation]) -> Iterator[HtmlTable]:
    """Quality, memory, and speed at each batch size: of what was evaluated."""
    names = [evaluation.model for evaluation in evaluations]
    if quality := [*quality_rows(evaluations)]:
        yield HtmlTable(["quality", *names], quality)
    if all(evaluation.speed for evaluation in evaluations):
        yield HtmlTable(["memory", *MEMORY_COLUMNS], [*memory_rows(names, evaluations)])
        for number, speed in enumerate(evaluations[0].speed.batches):
            speeds = [evaluation.speed.batches[number] for evaluation in evaluations]
            yield HtmlTable([f"speed at batch size {speed.batch}", *SPEED_COLUMNS], [*speed_rows(names, speeds)])


def evaluation_charts(evaluations: Sequence[ModelEvaluation]) -> Iterator[Chart]:
    """Tasks and speed, each model a colour."""
    if tasks := drawn_tasks(evaluations):
        yield tasks_chart(evaluations, tasks)
    if all(evaluation.speed for evaluation in evaluations):
        yield speed_chart(evaluations)


def drawn_tasks(evaluations: Sequence[ModelEvaluation]) -> dict[str, str]:
    """The tasks that have a metric to draw, and which that is."""
    found = {
        task: next((metric for metric in DRAWN_METRICS if metric in metrics), None)
        for task, metrics in evaluations[0].tasks.items()
    }
    return {task: metric for task, metric in found.items() if metric}


def tasks_chart(evaluations: Sequence[ModelEvaluation], tasks: dict[str, str]) -> Chart:
    figure = plain_figure(320, legend=ABOVE)
    for evaluation in evaluations:
        scores = [evaluation.tasks[task][metric] for task, metric in tasks.items()]
        errors = [evaluation.tasks[task].get(metric + STDERR, 0.0) for task, metric in tasks.items()]
        figure.add_bar(
            name=evaluation.model,
            x=[f"{task}<br>{metric}" for task, metric in tasks.items()],
            y=scores,
            error_y={"type": "data", "array": errors, "thickness": 1},
            hovertemplate="%{x}: %{y:.4f}<extra></extra>",
        )
    figure.update_yaxes(rangemode="tozero")
    sentence = "Scores on lm-eval's tasks, with their standard errors. Higher is better."
    return Chart("tasks", "Tasks", sentence, figure)


def speed_chart(evaluations: Sequence[ModelEvaluation]) -> Chart:
    figure = plain_figure(300, legend=ABOVE)
    for evaluation in evaluations:
        speeds = evaluation.speed.batches
        ratios = {f"{what}<br>batch {speed.batch}": speed for what in ("prefill", "decode") for speed in speeds}
        figure.add_bar(
            name=evaluation.model,
            x=list(ratios),
            y=[getattr(speed, f"{place.partition('<')[0]}_ratio") for place, speed in ratios.items()],
            hovertemplate="%{y:.2f} times as fast as " + evaluations[0].model + "<extra></extra>",
        )
    figure.update_yaxes(title_text=f"multiple of {evaluations[0].model}", rangemode="tozero")
    sentence = f"Tokens a second, as multiples of {evaluations[0].model}'s: medians over rounds that take turns."
    return Chart("speed", "Speed", sentence, figure)
