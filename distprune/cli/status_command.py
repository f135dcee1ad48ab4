"""``distprune status``."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from distprune import api
from distprune.cli.consoles import output_console


def status(
    output: Annotated[str, typer.Argument(metavar="OUTPUT", help="the --output of a pruning run")],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show the progress of a run, and whether it is running, stopped or finished."""
    from distprune.reporting import status_lines

    found = api.status(output)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        output_console.print(status_lines(found), highlight=False, markup=False)
