"""What a model is measured on, and the one place that asks distprune's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from distprune import api
from distprune.evaluation import EvaluationOptions, Loading
from distprune.evaluation.side_by_side import check_tasks, check_text
from distprune.pipeline.config import EvaluateConfig


@dataclass(frozen=True)
class Measured:
    """A model's numbers: perplexity where there is a text, and each task's metrics by name."""

    perplexity: float | None = None
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def measure(model: str, settings: EvaluateConfig, address: str | None, trust_remote_code: bool) -> Measured:
    """The numbers of a model in a folder.

    Raises:
        InputError: the model, the text or a task is unusable.
    """
    (found,) = api.evaluate(
        model,
        settings.text,
        field=settings.field,
        tasks=settings.tasks,
        include_path=settings.include_path,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
        sequence_length=settings.sequence_length,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        workers=settings.workers,
        address=address if settings.workers else None,
        trust_remote_code=trust_remote_code,
    )
    return Measured(found.perplexity and found.perplexity.perplexity, found.tasks)


def check_measurable(settings: EvaluateConfig, model: Path, trust_remote_code: bool) -> None:
    """See that a model in a folder, of which nothing but configuration and tokenizer is read, can be measured.

    Raises:
        InputError: it can't.
    """
    asked = settings.model_dump(exclude={"batch_size", "device", "dtype", "workers"})
    loading = Loading(settings.device, settings.dtype, settings.batch_size, trust_remote_code)
    options = EvaluationOptions(**asked, loading=loading)
    check_text([model], options)
    check_tasks([model], options)
