"""Evaluations in a model card: a line for each number, for the original and for the pruned model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from distprune.errors import InputError
from distprune.evaluation import ModelEvaluation


@dataclass(frozen=True)
class Results:
    """What the pruned model came to, and the original if that was evaluated with it.

    Attributes:
        rows: of a number's name, the original's number ("" where it was not evaluated) and the pruned model's.
        conditions: what perplexity was taken on; "" without a perplexity.
    """

    rows: list[tuple[str, str, str]]
    conditions: str


def results_of(evaluation: Sequence[ModelEvaluation], folder: Path) -> Results:
    """What an evaluation says of the checkpoint in a folder, beside what it says of the original.

    Raises:
        InputError: several models were evaluated, and none of them is the one in the folder.
    """
    pruned = chosen(evaluation, folder)
    original = evaluation[0] if evaluation[0] is not pruned else None
    before = dict(numbers(original)) if original else {}
    rows = [(name, before.get(name, ""), number) for name, number in numbers(pruned)]
    return Results(rows, conditions(pruned))


def chosen(evaluation: Sequence[ModelEvaluation], folder: Path) -> ModelEvaluation:
    """Of one or more evaluations that of the model in a folder: by its path, else its name, else the only one."""
    by_path = (each for each in evaluation if Path(each.model).resolve() == folder.resolve())
    by_name = (each for each in evaluation if Path(each.model).name == folder.name)
    if found := next(chain(by_path, by_name), None):
        return found
    if len(evaluation) == 1:
        return evaluation[0]
    names = ", ".join(each.model for each in evaluation)
    raise InputError(f"{folder}: is not among what was evaluated ({names}). Evaluate it, and give that.")


def numbers(evaluation: ModelEvaluation) -> Iterator[tuple[str, str]]:
    """Perplexity, and the metrics of lm-eval's tasks without their standard errors."""
    if evaluation.perplexity is not None:
        yield "perplexity", f"{evaluation.perplexity.perplexity:.2f}"
    for task, metrics in evaluation.tasks.items():
        yield from ((f"{task}, {name}", number) for name, number in metrics_of(metrics))


def metrics_of(metrics: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    return ((name, f"{number:.4f}") for name, number in metrics.items() if "_stderr" not in name)


def conditions(evaluation: ModelEvaluation) -> str:
    if evaluation.perplexity is None:
        return ""
    found = evaluation.perplexity
    text = f" on {Path(evaluation.text).name}" if evaluation.text else ""
    return f"Perplexity is taken{text}, over {found.tokens:,} tokens in windows of {found.sequence_length}."
