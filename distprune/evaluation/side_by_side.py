"""Several models, each asked the same: perplexity, lm-eval's tasks, speed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from distprune.calibration.text_sources import read_source
from distprune.calibration.whole_model import load_config
from distprune.errors import InputError
from distprune.evaluation.answering import Answering, Loading
from distprune.evaluation.perplexity import PerplexityResult, check_counts, perplexity_result, read_windows
from distprune.evaluation.scorer import scored_here
from distprune.evaluation.speed import Speed, SpeedOptions, check_speed, measure_speeds

if TYPE_CHECKING:
    from distprune.evaluation.harness import Tasks

#: Opens a model, and closes it afterwards.
Open = Callable[[Path, Loading], AbstractContextManager[Answering]]


@dataclass(frozen=True)
class EvaluationOptions:
    """What models are asked.

    Attributes:
        text: what perplexity is taken on: a file or data set that :func:`read_source` reads; None for no perplexity.
        field: the field of a record that holds its text.
        sequence_length: tokens of each window of the text.
        max_tokens: the text's first tokens alone.
        tasks: names or patterns of lm-eval's tasks.
        include_path: a folder of YAML files with further tasks.
        num_fewshot: examples before each question; by default each task's own number.
        limit: questions of each task, or the fraction of them where less than 1.
        speed: what is timed, if anything.
        loading: how models are loaded and run.
    """

    text: str | Path | None = None
    field: str | None = None
    sequence_length: int = 128
    max_tokens: int | None = None
    tasks: tuple[str, ...] = ()
    include_path: str | Path | None = None
    num_fewshot: int | None = None
    limit: float | None = None
    speed: SpeedOptions | None = None
    loading: Loading = dataclasses.field(default_factory=Loading)


@dataclass(frozen=True)
class ModelEvaluation:
    """What one model came to; None, or no tasks, for what was not asked.

    ``tasks`` holds metrics by task, under lm-eval's names, without the filter where that is "none". ``text`` is what
    perplexity was taken on.
    """

    model: str
    perplexity: PerplexityResult | None
    tasks: Mapping[str, Mapping[str, float]]
    speed: Speed | None
    text: str | None = None


def evaluate_models(
    models: Sequence[tuple[str, Path]],
    options: EvaluationOptions,
    opening: AbstractContextManager[Open] | None = None,
) -> list[ModelEvaluation]:
    """Evaluate models one after the other; the first is what the others are compared with.

    Args:
        models: what each is called, and its checkpoint's folder.
        options: what they are asked.
        opening: gives what opens a model, once everything is checked; by default models are in this process.

    Raises:
        InputError: something about the input is wrong. What can be known before weights are read is found before.
    """
    names, folders = zip(*models, strict=True)
    texts = check_text(folders, options)
    tasks = check_tasks(folders, options)
    if options.speed:
        for folder in folders:
            check_speed(options.speed, load_config(folder, options.loading.trust_remote_code), folder)

    scores: list[tuple[PerplexityResult | None, Mapping[str, Mapping[str, float]]]] = [(None, {})] * len(folders)
    if options.text is not None or tasks:
        with opening or nullcontext(scored_here) as open_model:
            scores = [
                score(open_model, folder, windows, tasks, options.loading)
                for folder, windows in zip(folders, texts, strict=True)
            ]
    speeds: list[Speed | None] = [None] * len(folders)
    if options.speed:
        speeds = [*measure_speeds(folders, options.loading, options.speed)]
    return [
        ModelEvaluation(name, perplexity, metrics, speed, None if options.text is None else str(options.text))
        for name, (perplexity, metrics), speed in zip(names, scores, speeds, strict=True)
    ]


def check_text(folders: Sequence[Path], options: EvaluationOptions) -> list[Tensor | None]:
    """Each model's windows of the text, if there is one: int64 (windows, length)."""
    check_counts(options.loading.batch_size, options.max_tokens)
    if options.text is None:
        if options.field is not None:
            raise InputError(f"--field {options.field}: belongs to --text, which is not given.")
        return [None] * len(folders)
    source = read_source(options.text, options.field)
    trusted = options.loading.trust_remote_code
    return [read_windows(folder, source, options.sequence_length, options.max_tokens, trusted) for folder in folders]


def check_tasks(folders: Sequence[Path], options: EvaluationOptions) -> Tasks | None:
    """Find the tasks, if there are any. The same questions go to all models."""
    if not options.tasks:
        given = {"include-path": options.include_path, "num-fewshot": options.num_fewshot, "limit": options.limit}
        for name, value in given.items():
            if value is not None:
                raise InputError(f"--{name} {value}: belongs to --tasks, which is not given.")
        return None
    try:
        from distprune.evaluation.harness import find_tasks
    except ImportError as error:
        raise InputError(
            f"--tasks {','.join(options.tasks)}: needs the package lm-eval, which can't be imported ({error}). "
            "Install it with pip install 'distprune[eval]'."
        ) from error
    return find_tasks(options.tasks, options.include_path, options.num_fewshot, options.limit, folders[0])


def score(
    open_model: Open, folder: Path, windows: Tensor | None, tasks: Tasks | None, loading: Loading
) -> tuple[PerplexityResult | None, Mapping[str, Mapping[str, float]]]:
    """One model's perplexity and metrics."""
    with open_model(folder, loading) as model:
        perplexity = None if windows is None else ask_perplexity(model, windows, loading.batch_size)
        if tasks is None:
            return perplexity, {}
        from distprune.evaluation.harness import score_tasks

        return perplexity, score_tasks(tasks, folder, loading, model)


def ask_perplexity(model: Answering, windows: Tensor, batch_size: int) -> PerplexityResult:
    """Perplexity on the windows, one batch a question."""
    dtype, start = model.dtype(), time.perf_counter()
    losses = model.ask("loss", windows.split(batch_size))
    return perplexity_result(losses, windows, time.perf_counter() - start, dtype)
