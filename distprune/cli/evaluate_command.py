"""``distprune evaluate``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Optional

import typer

from distprune import api
from distprune.cli.consoles import output_console
from distprune.cli.option_values import parse_batches
from distprune.cli.options import DTYPES, SOURCE, Address, Field, GpusPerWorker, Revision, TrustRemoteCode


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="folders, hub ids or .gguf files; the first is the baseline"),
    ],
    text: Annotated[Optional[str], typer.Option(help=f"perplexity on a {SOURCE}")] = None,
    field: Field = None,
    sequence_length: Annotated[int, typer.Option(help="tokens in each window")] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="use only this many tokens from the text's start")] = None,
    tasks: Annotated[Optional[str], typer.Option(metavar="NAME,...", help="lm-eval tasks, or patterns")] = None,
    include_path: Annotated[Optional[Path], typer.Option(help="folder of YAML files that define more tasks")] = None,
    num_fewshot: Annotated[Optional[int], typer.Option(help="examples before each question [each task's own]")] = None,
    limit: Annotated[Optional[float], typer.Option(help="questions per task; below 1, the fraction of them")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="measure tokens per second, KV cache and memory")] = False,
    speed_batches: Annotated[str, typer.Option(metavar="NUMBER,...", help="batch sizes to measure")] = "1,16",
    speed_prompt: Annotated[int, typer.Option(help="tokens in each prompt")] = 128,
    speed_new: Annotated[int, typer.Option(help="tokens to generate after it")] = 32,
    speed_rounds: Annotated[int, typer.Option(help="measurements of each")] = 5,
    speed_threads: Annotated[int, typer.Option(help="CPU threads of each model's process")] = 1,
    batch_size: Annotated[int, typer.Option(help="windows, or a task's requests, in one forward pass")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPES)] = "auto",
    workers: Annotated[
        Optional[str], typer.Option(metavar="MAX|MIN:MAX", help="Ray actors that share each model's work [none]")
    ] = None,
    threads_per_worker: Annotated[int, typer.Option(help="CPU threads of each worker")] = 1,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: a list with one object per model")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Evaluate models side by side, pruned or not: perplexity on a text, lm-eval tasks, speed."""
    given = dict(locals())
    as_json, given["tasks"] = given.pop("as_json"), tasks.split(",") if tasks else ()
    timed = {name: given.pop(f"speed_{name}") for name in ("batches", "prompt", "new", "rounds", "threads")}
    if speed:
        from distprune.evaluation import SpeedOptions

        given["speed"] = SpeedOptions(**timed | {"batches": parse_batches(timed["batches"], "--speed-batches")})
    found = api.evaluate(**given)
    if as_json:
        print(json.dumps([asdict(evaluation) for evaluation in found]))
        return
    from distprune.reporting import evaluation_lines

    for part in evaluation_lines(found):
        output_console.print(part, highlight=False, markup=False)
