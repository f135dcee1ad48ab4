"""What pruning buys where models are used: speed of prefill and decoding, KV cache and memory, dense beside pruned.

    python scripts/generation_speed.py DENSE PRUNED [PRUNED...] --batch 1 16 --threads 1

Each model lives in a process of its own. Rounds go over all models in turn, so that a machine that is slow for a while
is so for all of them: speeds are medians over rounds, and ratios medians of those within a round. Prompts are random
tokens; the cache is measured after decoding, as it is. On a GPU, where there is one, unless `--device` says otherwise.
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from distprune.calibration.model import input_device, load_model
from distprune.hardware import name_of
from distprune.modeling import CACHE

console = Console(soft_wrap=True)


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


def main() -> None:
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # read when a model's process starts
    models = [Contestant(path, arguments) for path in arguments.models]
    for model in models:  # what is first of its kind is slow, and does not count
        for batch in arguments.batch:
            model.measure(batch)
    rounds = [
        {batch: [model.measure(batch) for model in models] for batch in arguments.batch}
        for _ in range(arguments.rounds)
    ]
    show_sizes(models)
    for batch in arguments.batch:
        show_speeds(models, batch, [made[batch] for made in rounds])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folders or hub ids; the first is dense")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16], help="sequences at a time")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens to decode after it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    return parser.parse_args()


class Contestant:
    """A model in its own process."""

    def __init__(self, path: str, arguments: argparse.Namespace):
        self.name, self.arguments = Path(path).name, arguments
        start = partial(load, path, arguments.device, arguments.dtype, arguments.threads)
        self.process = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=start)

    def measure(self, batch: int) -> Measurement:
        return self.process.submit(measure, batch, self.arguments.prompt, self.arguments.new).result()

    def sizes(self) -> Sizes:
        return self.process.submit(sizes).result()


# ---------------------------------------------------------------- within a model's process

loaded: PreTrainedModel


def load(path: str, device: str, dtype: str, threads: int) -> None:
    global loaded
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(threads)
    loaded = load_model(path, device, dtype)


@torch.inference_mode()
def measure(batch: int, prompt: int, new: int) -> Measurement:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(loaded.config.vocab_size, (batch, prompt), generator=generator).to(input_device(loaded))
    cache = DynamicCache(config=loaded.config)
    options = {"use_cache": True, "logits_to_keep": 1, CACHE: cache}
    start = now()
    step = loaded(tokens, **options)
    prefilled = now()
    for _ in range(new):
        step = loaded(step.logits[:, -1:].argmax(-1), **options)
    decoded = now()
    cached = cache_bytes(cache) / (batch * (prompt + new))
    return Measurement(batch * prompt / (prefilled - start), batch * new / (decoded - prefilled), cached)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cache_bytes(cache: Cache) -> int:
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def sizes() -> Sizes:
    parameters = sum(parameter.nbytes for parameter in loaded.parameters())
    if input_device(loaded).type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Sizes(parameters, peak, name_of(loaded.dtype))


# ---------------------------------------------------------------- tables


def show_sizes(models: list[Contestant]) -> None:
    found = [model.sizes() for model in models]
    table = table_of(f"memory, in {found[0].dtype}", "model", "parameters, MiB", "peak, MiB")
    for model, size in zip(models, found, strict=True):
        table.add_row(
            model.name,
            against(size.parameters / 2**20, size.parameters / found[0].parameters),
            against(size.peak / 2**20, size.peak / found[0].peak),
        )
    console.print(table)


def show_speeds(models: list[Contestant], batch: int, rounds: list[list[Measurement]]) -> None:
    columns = {"prefill, tokens/s": "prefill", "decode, tokens/s": "decode", "KV cache, bytes/token": "cache"}
    table = table_of(f"batch {batch}", "model", *columns)
    for index, model in enumerate(models):
        table.add_row(model.name, *(compared(rounds, index, field) for field in columns.values()))
    console.print(table)


def compared(rounds: list[list[Measurement]], index: int, field: str) -> str:
    values = [(getattr(made[index], field), getattr(made[0], field)) for made in rounds]
    return against(median(value for value, _ in values), median(value / dense for value, dense in values))


def against(value: float, ratio: float) -> str:
    return f"{value:,.0f} ({ratio:.2f})"


def table_of(title: str, first: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(first, no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right")
    return table


if __name__ == "__main__":
    main()
