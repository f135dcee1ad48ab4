"""``distprune measure-latency``."""

from __future__ import annotations

from typing import Annotated

import typer

from distprune import api
from distprune.cli.consoles import error_console, output_console
from distprune.cli.option_values import parse_batches
from distprune.cli.options import DTYPES, Model, Revision, TrustRemoteCode


def measure_latency(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="JSON file to write")],
    batch: Annotated[str, typer.Option(metavar="NUMBER,...", help="batch sizes: sequences at a time")] = "1",
    prompt: Annotated[int, typer.Option(help="tokens in each prompt")] = 128,
    new: Annotated[int, typer.Option(help="tokens to generate after it; 0 leaves decoding out")] = 32,
    prefill_weight: Annotated[float, typer.Option(help="how often reading the prompt counts; 0 leaves it out")] = 1.0,
    rounds: Annotated[int, typer.Option(help="measurements of each shape")] = 40,
    threads: Annotated[int, typer.Option(help="CPU threads")] = 1,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    dtype: Annotated[str, typer.Option(help=DTYPES)] = "auto",
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure on this machine how long parts of the model's layers take, for prune --target latency."""
    from rich.progress import Progress

    from distprune.reporting.latency_tables import workload_table

    batches = parse_batches(batch, "--batch")
    with Progress(console=error_console, transient=True) as bars:
        bar = bars.add_task("Measuring", total=None)
        table = api.measure_latency(
            model,
            output,
            batch=batches,
            prompt=prompt,
            new=new,
            prefill_weight=prefill_weight,
            rounds=rounds,
            threads=threads,
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            on_round=lambda done, of: bars.update(bar, completed=done, total=of),
        )
    output_console.print(workload_table(table))
    output_console.print(f"{output}: latencies on {table.conditions}", highlight=False, markup=False)
