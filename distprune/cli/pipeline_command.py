"""``distprune pipeline``."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from distprune import api
from distprune.cli.consoles import display, output_console
from distprune.cli.options import LogFormatName

if TYPE_CHECKING:
    from distprune.pipeline import PipelineSummary


def pipeline(
    config: Annotated[Path, typer.Argument(metavar="PIPELINE.YAML", help="the pipeline's configuration")],
    as_json: Annotated[bool, typer.Option("--json", help="print the summary as JSON")] = False,
    log_format: Annotated[
        LogFormatName, typer.Option(help="progress on stderr: for people, or one JSON object per event")
    ] = LogFormatName.text,
    restart: Annotated[bool, typer.Option("--restart", help="redo every step")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and show which steps would be done")
    ] = False,
) -> None:
    """Calibrate, prune at several sparsities, evaluate, and publish what passes a gate. For schedulers.

    Steps whose inputs haven't changed are skipped, and an interrupted pipeline resumes. Exits with 0 if a model passes
    the gate, 3 if none does, 2 for bad input, 1 if a step fails and 130 if interrupted.
    """
    from distprune.engine.telemetry.harmless import harmless
    from distprune.engine.telemetry.log import json_lines
    from distprune.reporting.pipeline_tables import print_summary

    def tell(summary: PipelineSummary) -> None:
        with harmless("standard output"):
            if as_json:
                print(summary.to_json(), flush=True)
            else:
                print_summary(output_console, summary)

    is_text = log_format == LogFormatName.text
    with nullcontext() if is_text else json_lines(sys.stderr):
        api.pipeline(config, restart=restart, dry_run=dry_run, progress=display if is_text else None, on_summary=tell)
