"""``distprune card``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from distprune import api
from distprune.cli.consoles import output_console


def card(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="output folder of a pruning run")],
    evaluation: Annotated[
        Optional[Path], typer.Option(metavar="FILE", help="results to show: what `distprune evaluate --json` printed")
    ] = None,
    base_model: Annotated[
        Optional[str], typer.Option(metavar="ID", help="the original on the hub, if the run had it from elsewhere")
    ] = None,
) -> None:
    """Write the model card (README.md) of a pruned checkpoint anew."""
    api.card(directory, evaluation or (), base_model=base_model)
    output_console.print(f"{directory}/README.md: written", highlight=False, markup=False)
