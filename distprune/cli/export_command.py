"""``distprune export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distprune.cli.consoles import output_console


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="output folder of a pruning run")],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="GGUF file to write")],
) -> None:
    """Write a pruned checkpoint as a GGUF file, for llama.cpp and what is built on it."""
    from distprune.export import export_gguf

    export_gguf(directory, output)
    output_console.print(f"{output}: {output.stat().st_size / 1e9:.2f} GB", highlight=False, markup=False)
