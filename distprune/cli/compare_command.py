"""``distprune compare``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from distprune import api
from distprune.cli import options as opt
from distprune.cli.consoles import display, output_console
from distprune.cli.option_values import gather_groups, parse_option
from distprune.errors import InputError

if TYPE_CHECKING:
    from distprune.comparison import ComparisonRow


def compare(
    model: opt.OptionalModel = None,
    *,
    methods: Annotated[str, typer.Option(metavar="NAME,...", help="pruning methods; NAME+distill: with distillation")],
    sparsity: Annotated[str, typer.Option(metavar="NUMBER,...", help="fractions of decoder parameters to remove")],
    text: Annotated[str, typer.Option(help=f"to evaluate on: {opt.SOURCE}")],
    field: opt.Field = None,
    max_tokens: Annotated[Optional[int], typer.Option(help="use only this many tokens from the text's start")] = None,
    evaluation_length: Annotated[int, typer.Option(help="tokens in each window of the text")] = 128,
    option: Annotated[
        Optional[list[str]],
        typer.Option(metavar="METHOD.NAME=VALUE", help="hyperparameter of one method; repeatable"),
    ] = None,
    keep: Annotated[Optional[Path], typer.Option(help="folder in which to keep the pruned checkpoints")] = None,
    report: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="HTML file to draw the rows in [KEEP/report.html]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
    config: opt.Config = None,
    target: opt.Target = None,
    latency_table: opt.LatencyTable = None,
    count_embeddings: opt.CountEmbeddings = None,
    layout: opt.Layout = None,
    align: opt.Align = None,
    calibration: opt.CalibrationFile = None,
    samples: opt.Samples = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    distill_objective: opt.DistillObjective = None,
    distill_calibration: opt.DistillCalibration = None,
    distill_epochs: opt.DistillEpochs = None,
    distill_learning_rate: opt.DistillLearningRate = None,
    distill_train: opt.DistillTrain = None,
    distill_look_ahead: opt.DistillLookAhead = None,
    propagation: opt.Propagation = None,
    rounds: opt.Rounds = None,
    search: opt.Search = None,
    search_steps: opt.SearchSteps = None,
    search_seconds: opt.SearchSeconds = None,
    search_samples: opt.SearchSamples = None,
    search_calibration: opt.SearchCalibration = None,
    micro_batch: opt.MicroBatch = None,
    experts_at_once: opt.ExpertsAtOnce = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    offload: opt.Offload = None,
    workers: opt.Workers = None,
    threads_per_worker: opt.ThreadsPerWorker = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    address: opt.Address = None,
    weights: opt.Weights = None,
    writes: opt.Writes = None,
    overwrite: opt.Overwrite = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.OptionalTrust = None,
) -> None:
    """Compare methods at several sparsities on one calibration set, by perplexity, parameters and cost."""
    given = dict(locals())
    option, as_json = given.pop("option"), given.pop("as_json")
    given["methods"] = given["methods"].split(",")
    given["sparsities"] = [parse_sparsity(part) for part in given.pop("sparsity").split(",")]
    given["options"] = parse_method_options(option or ())
    gather_groups(given)
    rows: list[ComparisonRow] = []
    try:
        api.compare(progress=display, on_row=rows.append, **given)
    finally:  # rows that are there are printed although a later run fails
        if rows:
            print_rows(rows, as_json)


def parse_sparsity(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sparsity: '{text}' is not a number; write them as in 0.2,0.3.") from None


def parse_method_options(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``method.name=value``, by method; a method's name may hold '-' but no dot.

    Raises:
        InputError: one is written in another way.
    """
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        method, _, option = text.partition(".")
        if "=" in method or "=" not in option:
            raise InputError(f"--option {text}: write METHOD.NAME=VALUE.")
        name, value = parse_option(option)
        options.setdefault(method, {})[name] = value
    return options


def print_rows(rows: Sequence[ComparisonRow], as_json: bool) -> None:
    from distprune.reporting import comparison_table

    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        output_console.print(comparison_table(rows))
