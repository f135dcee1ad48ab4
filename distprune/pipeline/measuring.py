"""What a model is measured on, and the one place that asks distprune's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distprune.engine.evaluators import spread, workers_asked_for
from distprune.evaluation import EvaluationOptions, Loading, evaluate_models
from distprune.evaluation.side_by_side import check_tasks, check_text
from distprune.pipeline.settings import EvaluateConfig


@dataclass(frozen=True)
class Measured:
    """A model's numbers: perplexity where there is a text, and each task's metrics by name."""

    perplexity: float | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def measure(folder: Path, settings: EvaluateConfig, address: str | None, trust_remote_code: bool) -> Measured:
    """The numbers of a model.

    Raises:
        InputError: the model, the text or a task is unusable.
    """
    options = options_of(settings, trust_remote_code)
    workers = None
    if settings.workers is not None:
        workers = spread(workers_asked_for(options.loading, settings.workers, address))
    (found,) = evaluate_models([(str(folder), folder)], options, workers)
    return Measured(found.perplexity and found.perplexity.perplexity, found.tasks)


def check_measurable(settings: EvaluateConfig, folder: Path, trust_remote_code: bool) -> None:
    """See that a model, of which nothing but configuration and tokenizer is read, can be measured.

    Raises:
        InputError: it can't.
    """
    options = options_of(settings, trust_remote_code)
    check_text([folder], options)
    check_tasks([folder], options)


def options_of(settings: EvaluateConfig, trust_remote_code: bool) -> EvaluationOptions:
    loading = Loading(settings.device, settings.dtype, settings.batch_size, trust_remote_code)
    return EvaluationOptions(
        text=settings.text,
        field=settings.field,
        sequence_length=settings.sequence_length,
        max_tokens=settings.max_tokens,
        tasks=settings.tasks,
        include_path=settings.include_path,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        loading=loading,
    )
