"""``distprune report``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from distprune import api
from distprune.cli.consoles import output_console


def report(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="output folder of a pruning run")],
    evaluation: Annotated[
        Optional[str], typer.Option(metavar="FILE", help="output of evaluate --json, to show quality and speed too")
    ] = None,
    output: Annotated[
        Optional[str], typer.Option("--output", "-o", metavar="FILE", help="file to write [DIR/report.html]")
    ] = None,
) -> None:
    """Draw a run's report again, as a web page in one file."""
    written = api.report(directory, evaluation or (), output=output)
    output_console.print(str(written), highlight=False, markup=False)
