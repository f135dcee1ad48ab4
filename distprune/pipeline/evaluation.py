"""What a model is measured on, and the one place that asks distprune's evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from distprune import api
from distprune.errors import InputError
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
    check_measurable(settings)
    found = api.evaluate(
        model,
        settings.text,
        sequence_length=settings.sequence_length,
        max_tokens=settings.max_tokens,
        batch_size=settings.batch_size,
        device=settings.device,
        dtype=settings.dtype,
        trust_remote_code=trust_remote_code,
    )
    return Measured(found.perplexity)


def check_measurable(settings: EvaluateConfig) -> None:
    """See that this version can measure all that is asked for.

    Raises:
        InputError: it can't.
    """
    if settings.tasks:
        raise InputError("evaluate.tasks: this version evaluates perplexity alone. Leave tasks out, and give a text.")
