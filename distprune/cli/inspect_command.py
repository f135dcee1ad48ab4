"""``distprune inspect``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from distprune import api
from distprune.cli.consoles import output_console


def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="output folder of a pruning run")],
    as_json: Annotated[bool, typer.Option("--json", help="print the run's record as JSON")] = False,
) -> None:
    """Show what was removed from each layer."""
    from distprune.engine.run.record import forecast
    from distprune.reporting import layer_table, memory_line, parameter_table
    from distprune.reporting.latency_tables import prediction_table

    record = api.inspect(directory)
    if as_json:
        print(json.dumps(asdict(record)))
        return
    output_console.print(layer_table(record))
    output_console.print(parameter_table(record))
    if record.predicted_loss is not None:
        output_console.print(forecast(record.predicted_loss, record.gap), highlight=False)
    if record.latency is not None:
        output_console.print(prediction_table(record.latency))
    for note in record.notes:
        output_console.print(note, highlight=False, markup=False)
    output_console.print(memory_line(record), highlight=False)
