"""lm-eval's tasks. Tokenization, order, batches and metrics are lm-eval's own; batches are scored wherever a model is.

A batch is what lm-eval's Hugging Face model would put through its model at once. So scores are those of its command
line with the same batch size, to the bit, and do not depend on who scores which batch.
"""

from __future__ import annotations

import difflib
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import Collator
from lm_eval.tasks import TaskManager
from transformers import AutoConfig, PreTrainedModel

from distprune.errors import InputError
from distprune.evaluation.answering import Answering, Loading
from distprune.evaluation.environment import environment
from distprune.modeling.loading import without_weights

# lm-eval's own, which it sets once; set before each batch, sampled text depends on nothing but the batch.
SEED = 1234
NO_FILTER = "none"

#: Context and continuation as text, or None, and the token ids of each.
Request = tuple[tuple[str, str] | None, list[int], list[int]]


# ---------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Tasks:
    """Tasks that were found, and how many examples they get."""

    names: tuple[str, ...]
    manager: TaskManager
    num_fewshot: int | None = None
    limit: float | None = None


def find_tasks(
    names: Sequence[str],
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    limit: float | None = None,
    model: Path | None = None,
) -> Tasks:
    """Find tasks by name or pattern, and load their data once.

    Args:
        include_path: a folder of YAML files with further tasks.
        num_fewshot: examples before each question; by default the task's own number.
        limit: questions of each task, or the fraction of them where less than 1.
        model: the folder of the model whose tokenizer makes tasks of a given length.

    Raises:
        InputError: there is no such folder or task, or a task can't be loaded; names it and the fix.
    """
    if include_path is not None and not Path(include_path).is_dir():
        raise InputError(f"--include-path {include_path}: is no folder; give the one that holds the tasks' YAML files.")
    if limit is not None and limit <= 0:
        raise InputError(f"--limit {limit:g}: give a number of questions from 1, or a fraction below 1.")
    if num_fewshot is not None and num_fewshot < 0:
        raise InputError(f"--num-fewshot {num_fewshot}: at least 0 is needed.")
    with loading_tasks(f"--include-path {include_path}"):
        manager = TaskManager(
            include_path=None if include_path is None else str(include_path), metadata={"pretrained": str(model)}
        )
    found = tuple(dict.fromkeys(match for name in names for match in matches(manager, name)))
    for name in found:
        with loading_tasks(f"--tasks {name}"):
            loaded = manager.load([name])
        for task in loaded["tasks"].values():
            refuse_special(name, task)
    return Tasks(found, manager, num_fewshot, limit)


def matches(manager: TaskManager, name: str) -> list[str]:
    """The tasks, groups and tags that a name or pattern means.

    Raises:
        InputError: there are none; names the most similar ones.
    """
    if found := manager.match_tasks([name]):
        return found
    similar = difflib.get_close_matches(name, manager.all_tasks, n=3)
    guess = f" Did you mean {' or '.join(similar)}?" if similar else ""
    raise InputError(
        f"--tasks {name}: lm-eval has no such task.{guess} `lm_eval ls tasks` lists those that it has; give the folder "
        "that holds the YAML file of your own as --include-path."
    )


def refuse_special(name: str, task: Any) -> None:
    """Raise InputError for a task that runs the code that a model writes, or shows it pictures."""
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(
            f"--tasks {name}: runs code that models write. Where that is safe, run lm_eval itself on the folder, with "
            "--confirm_run_unsafe_code."
        )
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"--tasks {name}: asks about more than text; leave it out.")


@contextmanager
def loading_tasks(what: str) -> Iterator[None]:
    """What goes wrong inside is about a task's YAML file or its data."""
    try:
        with redirect_stdout(sys.stderr):
            yield
    except InputError:
        raise
    except Exception as error:  # YAML, data sets, the hub's client and the tasks' own code each raise their own kinds
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{what}: lm-eval can't load it ({reason}). Fix its YAML file, or the place or network that it reads its "
            "data from."
        ) from error


def score_tasks(tasks: Tasks, folder: Path, loading: Loading, model: Answering) -> dict[str, dict[str, float]]:
    """The metrics of each task, and of each group that has some, by lm-eval's names."""
    asking = AskingModel(folder, loading, model)
    # Tasks are programs, and ours is the one to print results. Lm-eval would find standard errors in forks of this
    # process, which hang where it has threads of Ray's or CUDA's.
    with redirect_stdout(sys.stderr), environment("DISABLE_MULTIPROC", "1"):
        found = simple_evaluate(
            model=asking,
            tasks=list(tasks.names),
            num_fewshot=tasks.num_fewshot,
            limit=tasks.limit,
            task_manager=tasks.manager,
            log_samples=False,
        )
    return {task: metrics_of(scores) for task, scores in found["results"].items()}


def metrics_of(scores: Mapping[str, Any]) -> dict[str, float]:
    """Lm-eval's "acc,none" is acc; other filters stay in the name. What is no number ("N/A") is left out."""
    metrics = {}
    for key, value in scores.items():
        metric, comma, filtered = key.partition(",")
        if comma and isinstance(value, int | float):
            metrics[metric if filtered == NO_FILTER else key] = float(value)
    return metrics


# ---------------------------------------------------------------- where the tasks are


class AskingModel(HFLM):
    """Lm-eval's Hugging Face model without weights, which asks another for the answers to each batch."""

    def __init__(self, folder: Path, loading: Loading, model: Answering):
        trusted = {"trust_remote_code": loading.trust_remote_code}
        with torch.device("meta"):
            shell = without_weights(AutoConfig.from_pretrained(folder, **trusted), **trusted)
        with without_warnings():
            # Lm-eval gives all windows of all documents at once to a model of such a batch size.
            super().__init__(pretrained=shell, tokenizer=str(folder), batch_size=sys.maxsize, **trusted)
        self._scored_at_once, self._answering = loading.batch_size, model

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        # Windows of long documents come with a batch size, and lm-eval batches them in their order.
        units = [[index] for index in range(len(requests))] if override_bs is not None else by_length(requests)
        batches = [
            [index for unit in units[first : first + self._scored_at_once] for index in unit]
            for first in range(0, len(units), self._scored_at_once)
        ]
        asked = [[requests[index] for index in batch] for batch in batches]
        answers: list[Any] = [None] * len(requests)
        for batch, scores in zip(batches, self._answering.ask("log_likelihoods", asked), strict=True):
            for index, score in zip(batch, scores, strict=True):
                answers[index] = score
        return answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Texts that continue the contexts, in batches of equal options and falling length."""
        ordered = Collator(
            [request.args for request in requests],
            sort_fn=lambda request: (-len(self.tok_encode(request[0])), request[0]),
            group_by="gen_kwargs",
            group_fn=lambda request: request[1],
        )
        batches = list(ordered.get_batched(n=self._scored_at_once))
        texts = self._answering.ask("generations", batches)
        return ordered.get_original([text for batch in texts for text in batch])

    def get_model_info(self) -> dict[str, Any]:
        """Nothing: lm-eval would ask the hub for a model that is a folder."""
        return {}


def by_length(requests: Sequence[Request]) -> list[list[int]]:
    """Indices of requests, longest first, together where they differ in their last token alone.

    One row of a forward pass answers those. The order is that of lm-eval's ``_loglikelihood_tokens``.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        alike.setdefault((*context, *continuation[:-1]), []).append(index)

    def order(indices: list[int]) -> tuple[int, list[int]]:
        _, context, continuation = requests[max(indices, key=lambda index: len(requests[index][2]))]
        return -len(context) - len(continuation), context + continuation

    return sorted(alike.values(), key=order)


# ---------------------------------------------------------------- where the weights are


def harness_model(model: PreTrainedModel, folder: Path, loading: Loading) -> HFLM:
    """Lm-eval's view of a loaded model."""
    with without_warnings():
        return HFLM(
            pretrained=model,
            tokenizer=str(folder),
            batch_size=loading.batch_size,
            trust_remote_code=loading.trust_remote_code,
        )


def log_likelihoods(model: HFLM, requests: Iterable[Request]) -> list[tuple[float, bool]]:
    """For each request of a batch, the continuation's log-likelihood, and whether greedy decoding would give it."""
    return model._loglikelihood_tokens(list(requests), disable_tqdm=True)


def generations(model: HFLM, requests: Iterable[tuple[str, dict]]) -> list[str]:
    """Texts that continue a batch of contexts with the same options.

    Raises:
        InputError: the model's context has no room for as many tokens as the task asks for.
    """
    torch.manual_seed(SEED)
    instances = [Instance("generate_until", {}, request, index) for index, request in enumerate(requests)]
    try:
        return model.generate_until(instances, disable_tqdm=True)
    except AssertionError as error:
        raise InputError(f"lm-eval: {error} Set max_gen_toks in the task's generation_kwargs.") from error


@contextmanager
def without_warnings() -> Iterator[None]:
    """Lm-eval warns of every model that is loaded already, as ours are."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
