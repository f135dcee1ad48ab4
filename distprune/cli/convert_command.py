"""``distprune convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distprune.cli.consoles import output_console


def convert(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="folder of a checkpoint that an earlier version wrote")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="folder to write")],
) -> None:
    """Rewrite a pruned checkpoint of an earlier version of distprune as this version writes it."""
    from distprune.export.convert import convert as rewrite

    rewrite(old, new)
    output_console.print(f"{new}: converted from {old}", highlight=False, markup=False)
