"""``distprune plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from distprune import api
from distprune.cli import options as opt
from distprune.cli.consoles import output_console
from distprune.cli.option_values import gather_groups, parse_options

if TYPE_CHECKING:
    from distprune.planning import RunPlan


def plan(
    model: opt.OptionalModel = None,
    gpus: Annotated[int, typer.Option(help="total number of GPUs; 0 plans for CPUs")] = 0,
    gpu_memory: Annotated[Optional[str], typer.Option(metavar="SIZE", help="memory of one GPU [80GB]")] = None,
    nodes: Annotated[int, typer.Option(help="number of machines")] = 1,
    host_memory: Annotated[
        Optional[str],
        typer.Option(metavar="SIZE", help="memory of one machine, such as 512GB [this one's, if for one CPU node]"),
    ] = None,
    hardware: Annotated[Optional[str], typer.Option(help="hardware whose rates to assume: h100, a100 or cpu")] = None,
    rate: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=VALUE", help="override a rate of that hardware; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
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
    distill: opt.Distill = None,
    distill_objective: opt.DistillObjective = None,
    distill_calibration: opt.DistillCalibration = None,
    distill_epochs: opt.DistillEpochs = None,
    distill_train: opt.DistillTrain = None,
    distill_look_ahead: opt.DistillLookAhead = None,
    propagation: opt.Propagation = None,
    rounds: opt.Rounds = None,
    micro_batch: opt.MicroBatch = None,
    experts_at_once: opt.ExpertsAtOnce = None,
    dtype: opt.Dtype = None,
    device: opt.Device = None,
    offload: opt.Offload = None,
    workers: opt.Workers = None,
    threads_per_worker: opt.ThreadsPerWorker = None,
    gpus_per_worker: opt.GpusPerWorker = None,
    max_shard_size: opt.MaxShardSize = None,
    revision: opt.Revision = None,
    trust_remote_code: opt.OptionalTrust = None,
) -> None:
    """Estimate what a pruning run would take, from the checkpoint's headers alone, and whether it would fit."""
    given = dict(locals())
    as_json, option, rate = given.pop("as_json"), given.pop("option"), given.pop("rate")
    if option:
        given["options"] = parse_options(option)
    gather_groups(given)
    planned = api.plan(rates=parse_options(rate or (), "--rate"), **given)
    if as_json:
        print(json.dumps(asdict(planned)))
        return
    print_plan(planned)


def print_plan(planned: RunPlan) -> None:
    from distprune.reporting import plan_tables as tables

    output_console.print(tables.plan_summary(planned), highlight=False, markup=False)
    output_console.print(tables.memory_table(planned))
    output_console.print(tables.stage_table(planned))
    output_console.print(tables.assumptions_line(planned), highlight=False)
    output_console.print(tables.verdict_line(planned), highlight=False)
