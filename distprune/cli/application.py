"""The program ``distprune``: its commands, and how its process starts and ends."""

from __future__ import annotations

import sys

import typer
from huggingface_hub.utils import disable_progress_bars

from distprune.cli.calibrate_command import calibrate
from distprune.cli.card_command import card
from distprune.cli.compare_command import compare
from distprune.cli.convert_command import convert
from distprune.cli.evaluate_command import evaluate
from distprune.cli.exit_status import exits_with_status
from distprune.cli.export_command import export
from distprune.cli.inspect_command import inspect
from distprune.cli.interrupts import heed_signals, ignore_signals
from distprune.cli.measure_latency_command import measure_latency
from distprune.cli.pipeline_command import pipeline
from distprune.cli.plan_command import plan
from distprune.cli.plan_from_command import plan_from
from distprune.cli.prune_command import prune
from distprune.cli.report_command import report
from distprune.cli.status_command import status

#: In the order in which the help lists them.
COMMANDS = (
    calibrate,
    prune,
    plan_from,
    plan,
    compare,
    evaluate,
    measure_latency,
    inspect,
    report,
    card,
    status,
    export,
    convert,
    pipeline,
)

app = typer.Typer(
    help="Prune large language models on a Ray cluster, without retraining.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in COMMANDS:
    app.command()(exits_with_status(command))


def main() -> None:
    """Run the command that the process was started with."""
    heed_signals()
    # They would garble our output. transformers, whose import takes seconds, heeds it for its own when it is imported.
    disable_progress_bars()
    for stream in (sys.stdout, sys.stderr):
        # Names of files may hold what the locale's encoding can't.
        stream.reconfigure(errors="backslashreplace")
    try:
        app(prog_name="distprune")
    finally:
        ignore_signals()
