"""The command line: distprune calibrate | plan | prune | compare | evaluate | inspect | status | pipeline."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import asdict
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
import yaml
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from distprune import api
from distprune.errors import GateFailed, InputError, InterruptedWhenDone, RunFailed

app = typer.Typer(
    help="Prune large language models on a Ray cluster, without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
output_console = Console(soft_wrap=True)
error_console = Console(stderr=True, soft_wrap=True)

FAILED = 1
BAD_INPUT = 2
GATE_FAILED = 3
INTERRUPTED = 130

Model = Annotated[str, typer.Argument(metavar="MODEL", help="local Hugging Face folder, hub id or .gguf file")]
Revision = Annotated[Optional[str], typer.Option(help="branch, tag or commit of a hub model")]
SOURCE = "text, JSON, CSV or Parquet file, or dataset name"
Field = Annotated[Optional[str], typer.Option(help="field of a record that holds its text or messages")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]

# Options of runs; None where the command line doesn't say, so that the YAML file can.
OptionalModel = Annotated[Optional[str], typer.Argument(metavar="MODEL", help="folder, hub id or .gguf file")]
Config = Annotated[Optional[Path], typer.Option(help="YAML file of options; the command line counts more")]
CountEmbeddings = Annotated[
    Optional[bool],
    typer.Option("--count-embeddings/--no-count-embeddings", help="a fraction of all parameters instead"),
]
Target = Annotated[
    Optional[str],
    typer.Option(metavar="RESOURCE", help="what it is a fraction of: parameters, flops, kv-cache, bytes [parameters]"),
]
Layout = Annotated[
    Optional[str],
    typer.Option(metavar="per-layer|stock", help="stock: same widths in all layers, a plain checkpoint [per-layer]"),
]
Align = Annotated[Optional[int], typer.Option(help="widths and ranks are multiples of this [8]")]
CalibrationFile = Annotated[Optional[str], typer.Option(help="calibration set in Arrow [the model's own samples]")]
Samples = Annotated[Optional[int], typer.Option(help="own samples to generate [128]")]
SequenceLength = Annotated[Optional[int], typer.Option(help="tokens of each own sample [128]")]
Seed = Annotated[Optional[int], typer.Option(help="seed of the own samples [0]")]
Distill = Annotated[
    Optional[bool], typer.Option("--distill/--no-distill", help="let the pruned layers learn from the dense model [no]")
]
DistillObjective = Annotated[
    Optional[str],
    typer.Option(metavar="layers|logits", help="each layer alone, or all together by the model's predictions [layers]"),
]
DistillCalibration = Annotated[
    Optional[str], typer.Option(help="calibration set to distil on, which may be larger [that of --calibration]")
]
DistillEpochs = Annotated[Optional[int], typer.Option(help="how often each sample is learnt from [1]")]
DistillLearningRate = Annotated[Optional[float], typer.Option(help="of AdamW, at its highest [0.0005; logits: 0.001]")]
DistillTrain = Annotated[
    Optional[str], typer.Option(metavar="full|lora", help="all weights, or low-rank updates [full; logits: lora]")
]
DistillLookAhead = Annotated[Optional[int], typer.Option(help="next layers that also judge a layer's output [1]")]
Propagation = Annotated[
    Optional[str], typer.Option(help="layers pruned on each other's outputs in a row, or full [full]")
]
MicroBatch = Annotated[Optional[int], typer.Option(help="samples in one forward pass [16]")]
DTYPES = "auto (the checkpoint's if the hardware computes in it at speed), float32, bfloat16 or float16"
Dtype = Annotated[Optional[str], typer.Option(help=f"{DTYPES} [auto]")]
Device = Annotated[Optional[str], typer.Option(help="auto, cpu or cuda [auto]")]
Offload = Annotated[
    Optional[bool],
    typer.Option("--offload/--no-offload", help="solve in the host's memory, for GPUs too small for it [no]"),
]
Workers = Annotated[
    Optional[str], typer.Option(metavar="MAX|MIN:MAX", help="worker actors [one a GPU, or a CPU share]")
]
ThreadsPerWorker = Annotated[Optional[int], typer.Option(help="CPU threads of each worker [1]")]
GpusPerWorker = Annotated[Optional[float], typer.Option(help="GPUs each worker asks for [1 on cuda]")]
Address = Annotated[Optional[str], typer.Option(help="Ray cluster to join [RAY_ADDRESS or a local one]")]
Weights = Annotated[
    Optional[str], typer.Option(metavar="auto|shared|served|hub", help="where workers read the model [auto]")
]
Writes = Annotated[
    Optional[str],
    typer.Option(metavar="auto|driver", help="workers that see the output write finished layers, or the driver [auto]"),
]
Overwrite = Annotated[Optional[bool], typer.Option("--overwrite/--no-overwrite", help="replace an existing output")]
Restart = Annotated[
    Optional[bool], typer.Option("--restart/--no-restart", help="begin anew where an unfinished run could go on")
]


class LogFormatName(str, Enum):
    """What a run says of itself, and where."""

    text = "text"
    json = "json"


LogFormat = Annotated[
    LogFormatName, typer.Option(help="progress for people on stderr, or a JSON object for each event on stdout")
]
OptionalTrust = Annotated[
    Optional[bool],
    typer.Option("--trust-remote-code/--no-trust-remote-code", help="run code that comes with the model"),
]


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def heed_signals() -> None:
    """From now on SIGTERM ends a command as Ctrl-C does, with a word and a status of its own."""
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, interrupt)


def ignore_signals() -> None:
    """From now on neither changes how a command ends, which is settled; where it was this module that heeded them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is interrupt:
            signal.signal(number, signal.SIG_IGN)


def explains_bad_input(command: Callable[..., None]) -> Callable[..., None]:
    """Print an error's message alone and exit with status 2 for bad input, 1 for a run that can be resumed later.

    A pipeline whose gate lets nothing through exits with 3, whatever was interrupted with 130.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            error_console.print(f"distprune: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(BAD_INPUT) from None
        except RunFailed as error:
            error_console.print(f"distprune: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(GATE_FAILED if isinstance(error, GateFailed) else FAILED) from None
        except KeyboardInterrupt:
            ignore_signals()
            error_console.print("distprune: interrupted. The same command goes on from what was done.", style="red")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


@app.command()
@explains_bad_input
def calibrate(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Arrow file to write")],
    text: Annotated[Optional[list[str]], typer.Option(help=f"{SOURCE}; repeatable")] = None,
    field: Field = None,
    samples: Annotated[int, typer.Option(help="windows in all")] = 128,
    sequence_length: Annotated[int, typer.Option(help="tokens of each window")] = 128,
    seed: Annotated[int, typer.Option(help="seed of the choice of windows")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; for the model's own samples")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{DTYPES}; for the model's own samples")] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a calibration set, from texts or (without --text) from the model's own samples."""
    calibration = api.calibrate(
        model,
        output,
        text=text or (),
        field=field,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    rows, length = calibration.tokens.shape
    output_console.print(f"{output}: {rows} windows of {length} tokens", highlight=False)


@app.command()
@explains_bad_input
def prune(
    model: OptionalModel = None,
    output: Annotated[
        Optional[str], typer.Option("--output", "-o", help="folder of the pruned checkpoint, or its s3:// or gs:// URL")
    ] = None,
    config: Config = None,
    method: Annotated[Optional[str], typer.Option(help="pruning method [curvature]")] = None,
    option: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=VALUE", help="hyperparameter of the method; repeatable"),
    ] = None,
    sparsity: Annotated[Optional[float], typer.Option(help="fraction of decoder parameters to remove [0.2]")] = None,
    target: Target = None,
    count_embeddings: CountEmbeddings = None,
    layout: Layout = None,
    align: Align = None,
    calibration: CalibrationFile = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    distill: Distill = None,
    distill_objective: DistillObjective = None,
    distill_calibration: DistillCalibration = None,
    distill_epochs: DistillEpochs = None,
    distill_learning_rate: DistillLearningRate = None,
    distill_train: DistillTrain = None,
    distill_look_ahead: DistillLookAhead = None,
    propagation: Propagation = None,
    micro_batch: MicroBatch = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = None,
    workers: Workers = None,
    threads_per_worker: ThreadsPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = None,
    weights: Weights = None,
    writes: Writes = None,
    max_shard_size: Annotated[Optional[int], typer.Option(help="bytes of one safetensors file [5000000000]")] = None,
    overwrite: Overwrite = None,
    restart: Restart = None,
    log_format: LogFormat = LogFormatName.text,
    revision: Revision = None,
    trust_remote_code: OptionalTrust = None,
) -> None:
    """Prune a model on Ray. Every option can also stand in the YAML file, with underscores."""
    given = dict(locals())
    config, option, log_format = given.pop("config"), given.pop("option"), given.pop("log_format")
    from distprune.engine.telemetry.harmless import harmless
    from distprune.engine.telemetry.log import json_lines
    from distprune.reporting import memory_line, parameter_table

    if option:
        given["options"] = dict(parse_option(text) for text in option)
    gather_distillation(given)
    as_json = log_format == LogFormatName.json
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
        output_console.print(memory_line(record), highlight=False)


def display() -> Any:
    """Progress on standard error, for as long as that can be written."""
    from distprune.engine.telemetry.harmless import Unfailing
    from distprune.reporting import console_progress

    return Unfailing("the display", lambda: console_progress(error_console))


@app.command()
@explains_bad_input
def plan(
    model: OptionalModel = None,
    gpus: Annotated[int, typer.Option(help="GPUs in all to ask for; 0 plans for the CPU")] = 0,
    gpu_memory: Annotated[Optional[str], typer.Option(metavar="SIZE", help="of one GPU [80GB]")] = None,
    nodes: Annotated[int, typer.Option(help="machines")] = 1,
    host_memory: Annotated[
        Optional[str],
        typer.Option(metavar="SIZE", help="of one machine, as in 512GB [this one's, if for one CPU node]"),
    ] = None,
    hardware: Annotated[Optional[str], typer.Option(help="h100, a100 or cpu: whose rates to assume")] = None,
    rate: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME=VALUE", help="another rate of a worker; repeatable")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the plan as JSON")] = False,
    config: Config = None,
    method: Annotated[Optional[str], typer.Option(help="pruning method [curvature]")] = None,
    option: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=VALUE", help="hyperparameter of the method; repeatable"),
    ] = None,
    sparsity: Annotated[Optional[float], typer.Option(help="fraction of decoder parameters to remove [0.2]")] = None,
    target: Target = None,
    count_embeddings: CountEmbeddings = None,
    layout: Layout = None,
    align: Align = None,
    calibration: CalibrationFile = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    distill: Distill = None,
    distill_objective: DistillObjective = None,
    distill_calibration: DistillCalibration = None,
    distill_epochs: DistillEpochs = None,
    distill_train: DistillTrain = None,
    distill_look_ahead: DistillLookAhead = None,
    propagation: Propagation = None,
    micro_batch: MicroBatch = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = None,
    workers: Workers = None,
    threads_per_worker: ThreadsPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    max_shard_size: Annotated[Optional[int], typer.Option(help="bytes of one safetensors file [5000000000]")] = None,
    revision: Revision = None,
    trust_remote_code: OptionalTrust = None,
) -> None:
    """What a pruning run would take, from the checkpoint's headers alone, and whether it would fit."""
    given = dict(locals())
    as_json, option, rate = given.pop("as_json"), given.pop("option"), given.pop("rate")
    if option:
        given["options"] = dict(parse_option(text) for text in option)
    gather_distillation(given)
    planned = api.plan(rates=dict(parse_option(text, "--rate") for text in rate or ()), **given)
    if as_json:
        print(json.dumps(asdict(planned)))
        return
    print_plan(planned)


def print_plan(planned: Any) -> None:
    from distprune.reporting import plan_tables as tables

    output_console.print(tables.plan_summary(planned), highlight=False, markup=False)
    output_console.print(tables.memory_table(planned))
    output_console.print(tables.stage_table(planned))
    output_console.print(tables.assumptions_line(planned), highlight=False)
    output_console.print(tables.verdict_line(planned), highlight=False)


@app.command()
@explains_bad_input
def compare(
    model: OptionalModel = None,
    *,
    methods: Annotated[str, typer.Option(metavar="NAME,...", help="pruning methods; NAME+distill: with distillation")],
    sparsity: Annotated[str, typer.Option(metavar="NUMBER,...", help="fractions of decoder parameters to remove")],
    text: Annotated[str, typer.Option(help=f"to evaluate on: {SOURCE}")],
    field: Field = None,
    max_tokens: Annotated[Optional[int], typer.Option(help="use the text's first tokens only")] = None,
    evaluation_length: Annotated[int, typer.Option(help="tokens of each window of the text")] = 128,
    option: Annotated[
        Optional[list[str]],
        typer.Option(metavar="METHOD.NAME=VALUE", help="hyperparameter of one method; repeatable"),
    ] = None,
    keep: Annotated[Optional[Path], typer.Option(help="folder where the pruned checkpoints stay")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print the rows as JSON")] = False,
    config: Config = None,
    target: Target = None,
    count_embeddings: CountEmbeddings = None,
    layout: Layout = None,
    align: Align = None,
    calibration: CalibrationFile = None,
    samples: Samples = None,
    sequence_length: SequenceLength = None,
    seed: Seed = None,
    distill_objective: DistillObjective = None,
    distill_calibration: DistillCalibration = None,
    distill_epochs: DistillEpochs = None,
    distill_learning_rate: DistillLearningRate = None,
    distill_train: DistillTrain = None,
    distill_look_ahead: DistillLookAhead = None,
    propagation: Propagation = None,
    micro_batch: MicroBatch = None,
    dtype: Dtype = None,
    device: Device = None,
    offload: Offload = None,
    workers: Workers = None,
    threads_per_worker: ThreadsPerWorker = None,
    gpus_per_worker: GpusPerWorker = None,
    address: Address = None,
    weights: Weights = None,
    writes: Writes = None,
    overwrite: Overwrite = None,
    revision: Revision = None,
    trust_remote_code: OptionalTrust = None,
) -> None:
    """Several methods at several sparsities on one calibration set: a table of perplexity, parameters and cost."""
    given = dict(locals())
    option, as_json = given.pop("option"), given.pop("as_json")
    given["methods"] = given["methods"].split(",")
    given["sparsities"] = [parse_sparsity(part) for part in given.pop("sparsity").split(",")]
    given["options"] = parse_method_options(option or ())
    gather_distillation(given)
    rows: list[Any] = []
    try:
        api.compare(progress=display, on_row=rows.append, **given)
    finally:  # a run that fails doesn't take along those before it
        if rows:
            print_rows(rows, as_json)


def gather_distillation(given: dict[str, Any]) -> None:
    """Turn the options of distillation into one mapping; any of them asks for it."""
    prefix = "distill_"
    options = {name.removeprefix(prefix): given.pop(name) for name in list(given) if name.startswith(prefix)}
    options = {name: value for name, value in options.items() if value is not None}
    if given.get("distill") is not False and (options or given.get("distill")):
        given["distill"] = options


def print_rows(rows: list[Any], as_json: bool) -> None:
    from distprune.reporting import comparison_table

    if as_json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        output_console.print(comparison_table(rows))


def parse_sparsity(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InputError(f"--sparsity: '{text}' is no number; write them as in 0.2,0.3.") from None


def parse_method_options(texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """``method.name=value``, by method; a method's name may hold '-' but no dot."""
    options: dict[str, dict[str, Any]] = {}
    for text in texts:
        method, _, option = text.partition(".")
        if "=" in method or "=" not in option:
            raise InputError(f"--option {text}: write METHOD.NAME=VALUE.")
        name, value = parse_option(option)
        options.setdefault(method, {})[name] = value
    return options


def parse_option(text: str, option: str = "--option") -> tuple[str, Any]:
    """``name=value``, the value read as YAML reads it."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{option} {text}: write NAME=VALUE.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"{option} {text}: '{value}' is no value; quote it as in YAML.") from None


@app.command()
@explains_bad_input
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL...", help="folders, hub ids, .gguf files; others against the first"),
    ],
    text: Annotated[Optional[str], typer.Option(help=f"perplexity on a {SOURCE}")] = None,
    field: Field = None,
    sequence_length: Annotated[int, typer.Option(help="tokens of each window")] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="use the text's first tokens only")] = None,
    tasks: Annotated[Optional[str], typer.Option(metavar="NAME,...", help="lm-eval's tasks, or patterns")] = None,
    include_path: Annotated[Optional[Path], typer.Option(help="folder with YAML files of further tasks")] = None,
    num_fewshot: Annotated[Optional[int], typer.Option(help="examples before each question [each task's own]")] = None,
    limit: Annotated[Optional[float], typer.Option(help="questions of each task, or a fraction of them")] = None,
    speed: Annotated[bool, typer.Option("--speed", help="tokens a second, KV cache and memory")] = False,
    speed_batches: Annotated[str, typer.Option(metavar="NUMBER,...", help="sequences at a time")] = "1,16",
    speed_prompt: Annotated[int, typer.Option(help="tokens of each prompt")] = 128,
    speed_new: Annotated[int, typer.Option(help="tokens to decode after it")] = 32,
    speed_rounds: Annotated[int, typer.Option(help="times that each is measured")] = 5,
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
    as_json: Annotated[bool, typer.Option("--json", help="print JSON: a list of one object a model")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Models side by side, pruned or not: perplexity on a text, lm-eval's tasks, speed."""
    given = dict(locals())
    as_json, given["tasks"] = given.pop("as_json"), tasks.split(",") if tasks else ()
    timed = {name: given.pop(f"speed_{name}") for name in ("batches", "prompt", "new", "rounds", "threads")}
    if speed:
        from distprune.evaluation import SpeedOptions

        given["speed"] = SpeedOptions(**timed | {"batches": parse_batches(timed["batches"])})
    found = api.evaluate(**given)
    if as_json:
        print(json.dumps([asdict(evaluation) for evaluation in found]))
        return
    from distprune.reporting import evaluation_lines

    for part in evaluation_lines(found):
        output_console.print(part, highlight=False, markup=False)


def parse_batches(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise InputError(f"--speed-batches {text}: write numbers of sequences, as in 1,16.") from None


@app.command()
@explains_bad_input
def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="output folder of a pruning run")],
    as_json: Annotated[bool, typer.Option("--json", help="print the run's record as JSON")] = False,
) -> None:
    """What was taken from which layer."""
    from distprune.engine.run.record import forecast
    from distprune.reporting import layer_table, memory_line, parameter_table

    record = api.inspect(directory)
    if as_json:
        print(json.dumps(asdict(record)))
        return
    output_console.print(layer_table(record))
    output_console.print(parameter_table(record))
    if record.predicted_loss is not None:
        output_console.print(forecast(record.predicted_loss, record.gap), highlight=False)
    for note in record.notes:
        output_console.print(note, highlight=False, markup=False)
    output_console.print(memory_line(record), highlight=False)


@app.command()
@explains_bad_input
def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="the --output of a pruning run")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """How far a run is: running, stopped or finished."""
    from distprune.reporting import status_lines

    found = api.status(output)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        output_console.print(status_lines(found), highlight=False, markup=False)


@app.command()
@explains_bad_input
def pipeline(
    config: Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", help="the pipeline's configuration")],
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
    log_format: Annotated[
        LogFormatName, typer.Option(help="progress on stderr: for people, or a JSON object for each event")
    ] = LogFormatName.text,
    restart: Annotated[bool, typer.Option("--restart", help="do every step anew")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and tell which steps would be done")
    ] = False,
) -> None:
    """Calibrate, prune at several sparsities, evaluate, and publish what passes a gate. For schedulers.

    What has not changed is not done again, and an interrupted pipeline resumes. Exits with 0 where something passes,
    3 where nothing does, 2 for bad input, 1 where it failed and 130 where it was interrupted.
    """
    from distprune.engine.telemetry.harmless import harmless
    from distprune.engine.telemetry.log import json_lines
    from distprune.reporting.pipeline_tables import print_summary

    def tell(summary: Any) -> None:
        with harmless("standard output"):
            if as_json:
                print(summary.to_json(), flush=True)
            else:
                print_summary(output_console, summary)

    is_text = log_format == LogFormatName.text
    with nullcontext() if is_text else json_lines(sys.stderr):
        api.pipeline(config, restart=restart, dry_run=dry_run, progress=display if is_text else None, on_summary=tell)


def main() -> None:
    heed_signals()
    disable_progress_bar()  # transformers' own, which would run through our output
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold what the locale's encoding can't.
        stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="distprune")
    finally:
        ignore_signals()


if __name__ == "__main__":
    sys.exit(main())
