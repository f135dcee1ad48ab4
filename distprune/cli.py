"""The command line: distprune calibrate | prune | evaluate | inspect."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Optional

import typer
import yaml
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from distprune import api
from distprune.errors import InputError

app = typer.Typer(
    help="Prune large language models on a Ray cluster, without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
output_console = Console(soft_wrap=True)
error_console = Console(stderr=True, soft_wrap=True)

BAD_INPUT = 2

Model = Annotated[str, typer.Argument(metavar="MODEL", help="local Hugging Face folder, hub id or .gguf file")]
Revision = Annotated[Optional[str], typer.Option(help="branch, tag or commit of a hub model")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="run code that comes with the model")]


def explains_bad_input(command: Callable[..., None]) -> Callable[..., None]:
    """Print an InputError's message alone and exit with status 2."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except InputError as error:
            error_console.print(f"distprune: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(BAD_INPUT) from None

    return wrapped


@app.command()
@explains_bad_input
def calibrate(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Arrow file to write")],
    text: Annotated[
        Optional[list[str]], typer.Option(help="text, JSONL or Parquet file, or dataset name; repeatable")
    ] = None,
    field: Annotated[Optional[str], typer.Option(help="field of a record that holds its text")] = None,
    samples: Annotated[int, typer.Option(help="windows in all")] = 128,
    sequence_length: Annotated[int, typer.Option(help="tokens of each window")] = 128,
    seed: Annotated[int, typer.Option(help="seed of the choice of windows")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; for the model's own samples")] = "auto",
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
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    rows, length = calibration.tokens.shape
    output_console.print(f"{output}: {rows} windows of {length} tokens", highlight=False)


@app.command()
@explains_bad_input
def prune(
    model: Annotated[Optional[str], typer.Argument(metavar="MODEL", help="folder, hub id or .gguf file")] = None,
    output: Annotated[Optional[Path], typer.Option("--output", "-o", help="folder of the pruned checkpoint")] = None,
    config: Annotated[Optional[Path], typer.Option(help="YAML file of options; the command line counts more")] = None,
    method: Annotated[Optional[str], typer.Option(help="pruning method [olica]")] = None,
    option: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=VALUE", help="hyperparameter of the method; repeatable"),
    ] = None,
    sparsity: Annotated[Optional[float], typer.Option(help="fraction of decoder parameters to remove [0.2]")] = None,
    count_embeddings: Annotated[
        Optional[bool],
        typer.Option("--count-embeddings/--no-count-embeddings", help="a fraction of all parameters instead"),
    ] = None,
    align: Annotated[Optional[int], typer.Option(help="widths and ranks are multiples of this [8]")] = None,
    calibration: Annotated[
        Optional[Path], typer.Option(help="calibration set in Arrow [the model's own samples]")
    ] = None,
    samples: Annotated[Optional[int], typer.Option(help="own samples to generate [128]")] = None,
    sequence_length: Annotated[Optional[int], typer.Option(help="tokens of each own sample [128]")] = None,
    seed: Annotated[Optional[int], typer.Option(help="seed of the own samples [0]")] = None,
    propagation: Annotated[
        Optional[str], typer.Option(help="layers pruned on each other's outputs in a row, or full [full]")
    ] = None,
    micro_batch: Annotated[Optional[int], typer.Option(help="samples in one forward pass [16]")] = None,
    dtype: Annotated[Optional[str], typer.Option(help="auto, float32, bfloat16 or float16 [auto]")] = None,
    device: Annotated[Optional[str], typer.Option(help="auto, cpu or cuda [auto]")] = None,
    workers: Annotated[Optional[int], typer.Option(help="worker actors [one a GPU, or a CPU share]")] = None,
    threads_per_worker: Annotated[Optional[int], typer.Option(help="CPU threads of each worker [1]")] = None,
    gpus_per_worker: Annotated[Optional[float], typer.Option(help="GPUs each worker asks for [1 on cuda]")] = None,
    address: Annotated[Optional[str], typer.Option(help="Ray cluster to join [RAY_ADDRESS or a local one]")] = None,
    max_shard_size: Annotated[Optional[int], typer.Option(help="bytes of one safetensors file [5000000000]")] = None,
    overwrite: Annotated[
        Optional[bool], typer.Option("--overwrite/--no-overwrite", help="replace an existing output")
    ] = None,
    revision: Revision = None,
    trust_remote_code: Annotated[
        Optional[bool],
        typer.Option("--trust-remote-code/--no-trust-remote-code", help="run code that comes with the model"),
    ] = None,
) -> None:
    """Prune a model on Ray. Every option can also stand in the YAML file, with underscores."""
    given = dict(locals())
    config, option = given.pop("config"), given.pop("option")
    from distprune.engine.progress import console_progress
    from distprune.reporting import memory_line, parameter_table

    if option:
        given["options"] = dict(parse_option(text) for text in option)
    record = api.prune(config=config, progress=console_progress(error_console), **given)
    output_console.print(parameter_table(record))
    output_console.print(memory_line(record), highlight=False)


def parse_option(text: str) -> tuple[str, Any]:
    """``name=value``, the value read as YAML reads it."""
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"--option {text}: write NAME=VALUE.")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError:
        raise InputError(f"--option {text}: '{value}' is no value; quote it as in YAML.") from None


@app.command()
@explains_bad_input
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="plain text file")],
    sequence_length: Annotated[int, typer.Option(help="tokens of each window")] = 128,
    max_tokens: Annotated[Optional[int], typer.Option(help="use the text's first tokens only")] = None,
    batch_size: Annotated[int, typer.Option(help="windows in one forward pass")] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Perplexity of a model, pruned or not, on a text."""
    result = api.evaluate(
        model,
        text,
        sequence_length=sequence_length,
        max_tokens=max_tokens,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(asdict(result)))
    else:
        output_console.print(
            f"perplexity {result.perplexity:.2f} on {result.tokens} tokens "
            f"({result.windows} windows of {result.sequence_length}, {result.seconds:.1f} s)",
            highlight=False,
        )


@app.command()
@explains_bad_input
def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of a pruning run")],
    as_json: Annotated[bool, typer.Option("--json", help="print the run's record as JSON")] = False,
) -> None:
    """What was taken from which layer."""
    from distprune.reporting import layer_table, memory_line, parameter_table

    record = api.inspect(directory)
    if as_json:
        print(json.dumps(asdict(record)))
        return
    output_console.print(layer_table(record))
    output_console.print(parameter_table(record))
    output_console.print(memory_line(record), highlight=False)


def main() -> None:
    disable_progress_bar()  # transformers' own, which would run through our output
    app(prog_name="distprune")


if __name__ == "__main__":
    sys.exit(main())
