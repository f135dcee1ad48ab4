"""What pruning buys where models are used: speed of prefill and decoding, KV cache and memory, dense beside pruned.

Each model lives in a process of its own. Rounds go over all models in turn, so that a machine that is slow for a while
is so for all of them: speeds are medians over rounds, and ratios medians of those within a round. Prompts are random
tokens; the cache is measured after decoding, as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from distprune.calibration.whole_model import check_sequence_length, input_device, load_model
from distprune.errors import InputError
from distprune.evaluation.answering import Loading
from distprune.evaluation.environment import environment
from distprune.hardware import name_of
from distprune.modeling import CACHE
from distprune.resident import peak_resident


@dataclass(frozen=True)
class SpeedOptions:
    """What is timed: for each batch size, a prompt and new tokens after it, so many times.

    Attributes:
        batches: sequences at a time.
        prompt: tokens of each prompt.
        new: tokens decoded after it.
        rounds: times that each is measured.
        threads: of each model's process on a CPU.
    """

    batches: tuple[int, ...] = (1, 16)
    prompt: int = 128
    new: int = 32
    rounds: int = 5
    threads: int = 1


@dataclass(frozen=True)
class BatchSpeed:
    """Tokens a second over the whole batch, and as multiples of the first model's."""

    batch: int
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float


@dataclass(frozen=True)
class Speed:
    """A model's speed at each batch size, and its sizes in bytes.

    Attributes:
        cache_bytes_per_token: of the KV cache, for one sequence.
        parameter_bytes: in ``dtype``.
        peak_bytes: the most that the process held, or of the GPU's memory where it ran on one.
    """

    batches: tuple[BatchSpeed, ...]
    cache_bytes_per_token: float
    parameter_bytes: int
    peak_bytes: int
    dtype: str


@dataclass(frozen=True)
class Sizes:
    """Bytes of the parameters, which are in a dtype, and the most that the process, or the GPU, held since it began."""

    parameters: int
    peak: int
    dtype: str


@dataclass(frozen=True)
class Measurement:
    """Tokens a second over the whole batch, and bytes of the cache for one token of one sequence."""

    prefill: float
    decode: float
    cache: float


Rounds = list[list[Measurement]]  # by round, then by model


def check_speed(options: SpeedOptions, config: PretrainedConfig, model_path: Path) -> None:
    """Raise InputError unless the model can be timed so."""
    counts = {"prompt": options.prompt, "new": options.new, "rounds": options.rounds, "threads": options.threads}
    for name, count in {**counts, "batches": min(options.batches, default=0)}.items():
        if count < 1:
            raise InputError(f"--speed-{name} {count}: at least 1 is needed.")
    try:
        check_sequence_length(options.prompt + options.new, config, model_path)
    except InputError as error:
        raise InputError(f"--speed-prompt {options.prompt} and --speed-new {options.new}: {error}") from None


def measure_speeds(folders: Sequence[Path], loading: Loading, options: SpeedOptions) -> list[Speed]:
    """Time several models in turn, each in a process of its own on this machine.

    Raises:
        InputError: a model can't be loaded.
    """
    with ExitStack() as stack:
        stack.enter_context(environment("OMP_NUM_THREADS", str(options.threads)))  # read when a process starts
        models = [stack.enter_context(OwnProcess(folder, loading, options.threads)) for folder in folders]

        def one_round() -> list[list[Measurement]]:
            return [[model.ask(timed, batch, options) for model in models] for batch in options.batches]

        one_round()  # what is first of its kind is slow, and does not count
        rounds = [one_round() for _ in range(options.rounds)]
        sizes = [model.ask(sizes_of_loaded) for model in models]
    by_batch = [[made[number] for made in rounds] for number in range(len(options.batches))]
    return [
        Speed(
            batches=tuple(
                batch_speed(batch, made, index) for batch, made in zip(options.batches, by_batch, strict=True)
            ),
            cache_bytes_per_token=by_batch[-1][-1][index].cache,
            parameter_bytes=size.parameters,
            peak_bytes=size.peak,
            dtype=size.dtype,
        )
        for index, size in enumerate(sizes)
    ]


def batch_speed(batch: int, rounds: Rounds, index: int) -> BatchSpeed:
    """A model's medians over the rounds at one batch size."""

    def middle(field: str) -> tuple[float, float]:
        values = [(getattr(made[index], field), getattr(made[0], field)) for made in rounds]
        return median(value for value, _ in values), median(value / first for value, first in values)

    (prefill, prefill_ratio), (decode, decode_ratio) = middle("prefill"), middle("decode")
    return BatchSpeed(batch, prefill, decode, prefill_ratio, decode_ratio)


class OwnProcess:
    """A process with one model in it."""

    def __init__(self, folder: Path, loading: Loading, threads: int):
        self._folder = folder
        self._process = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self._loaded = self._process.submit(load, folder, loading, threads)

    def ask(self, function: Any, *arguments: Any) -> Any:
        """What a function gives in the process, once its model is loaded."""
        self._value(self._loaded)
        return self._value(self._process.submit(partial(function, *arguments)))

    def _value(self, future: Future) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            raise InputError(
                f"{self._folder}: the process that measures its speed has died, most likely for lack of memory. Give "
                "fewer models at a time, or smaller --speed-batches."
            ) from None

    def __enter__(self) -> OwnProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.shutdown(cancel_futures=True)


# ---------------------------------------------------------------- within a model's process

loaded: PreTrainedModel


def load(folder: Path, loading: Loading, threads: int) -> None:
    """Load the model that this process is for."""
    global loaded
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    loaded = load_model(folder, loading.device, loading.dtype, loading.trust_remote_code)


def timed(batch: int, options: SpeedOptions) -> Measurement:
    """Time the model that this process is for."""
    return measure(loaded, batch, options.prompt, options.new)


def sizes_of_loaded() -> Sizes:
    """Size up the model that this process is for."""
    return sizes_of(loaded)


@torch.inference_mode()
def measure(model: PreTrainedModel, batch: int, prompt: int, new: int) -> Measurement:
    """Time one prefill and the decoding of new tokens after it, greedily, for a batch of random prompts."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    tokens = torch.randint(vocabulary, (batch, prompt), generator=generator).to(input_device(model))
    cache = DynamicCache(config=model.config)
    options = {"use_cache": True, "logits_to_keep": 1, CACHE: cache}
    start = now()
    step = model(tokens, **options)
    prefilled = now()
    for _ in range(new):
        step = model(step.logits[:, -1:].argmax(-1), **options)
    decoded = now()
    cached = cache_bytes(cache) / (batch * (prompt + new))
    return Measurement(batch * prompt / (prefilled - start), batch * new / (decoded - prefilled), cached)


def now() -> float:
    """Seconds on a clock, once the GPU has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cache_bytes(cache: Cache) -> int:
    """Bytes of all keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def sizes_of(model: PreTrainedModel) -> Sizes:
    """Bytes of a model and of the process that it is in."""
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    peak = torch.cuda.max_memory_allocated() if input_device(model).type == "cuda" else peak_resident()
    return Sizes(parameters, peak, name_of(model.dtype))
