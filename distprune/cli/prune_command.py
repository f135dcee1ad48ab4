"""``distprune prune``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Annotated, Optional

import typer

from distprune import api
from distprune.cli import options as opt
from distprune.cli.consoles import display, output_console
from distprune.cli.interrupts import ignore_signals
from distprune.cli.option_values import gather_groups, parse_options
from distprune.errors import InterruptedWhenDone


def prune(
    model: opt.OptionalModel = None,
    output: Annotated[
        Optional[str], typer.Option("--output", "-o", help="folder of the pruned checkpoint, or its s3:// or gs:// URL")
    ] = None,
    config: opt.Config = None,
    method: opt.Method = None,
    option: opt.MethodOptions = None,
    sparsity: opt.Sparsity = None,
    target: opt.Target = None,
    latency_table: opt.LatencyTable = None,
    count_embeddings: opt.CountEmbeddings = None,
    layout: opt.Layout = None,
    align: opt.Align = None,
    calibration: opt.CalibrationFile = None,
    samples: opt.Samples = None,
    sequence_length: opt.SequenceLength = None,
    seed: opt.Seed = None,
    distill: opt.Distill = None,
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
    library: opt.Library = None,
    from_library: opt.FromLibrary = None,
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
    max_shard_size: opt.MaxShardSize = None,
    push_to_hub: opt.PushToHub = None,
    hub_ignore: opt.HubIgnore = None,
    private: opt.Private = None,
    overwrite: opt.Overwrite = None,
    restart: opt.Restart = None,
    log_format: Annotated[
        opt.LogFormatName,
        typer.Option(help="progress for people on stderr, or one JSON object per event on stdout"),
    ] = opt.LogFormatName.text,
    revision: opt.Revision = None,
    trust_remote_code: opt.OptionalTrust = None,
) -> None:
    """Prune a model on Ray. Every option can also be set in the YAML file, with underscores for hyphens."""
    given = dict(locals())
    config, option, log_format = given.pop("config"), given.pop("option"), given.pop("log_format")
    from distprune.config import load_config
    from distprune.engine.telemetry.harmless import harmless
    from distprune.engine.telemetry.log import json_lines
    from distprune.reporting import memory_line, parameter_table, place_line
    from distprune.reporting.latency_tables import prediction_table

    if option:
        given["options"] = parse_options(option)
    gather_groups(given)
    as_json = log_format == opt.LogFormatName.json
    try:
        with json_lines(sys.stdout) if as_json else nullcontext():
            record = api.prune(config=config, progress=None if as_json else display(), **given)
    except InterruptedWhenDone as interruption:
        record = interruption.record
    ignore_signals()
    if as_json:
        return
    with harmless("standard output"):
        output_console.print(parameter_table(record))
        if record.latency is not None:
            output_console.print(prediction_table(record.latency))
        output_console.print(memory_line(record), highlight=False)
        output_console.print(place_line(load_config(config, given).output), highlight=False, markup=False)
