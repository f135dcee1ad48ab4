"""``distprune export``."""

from __future__ import annotations

from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Optional

import typer

from distprune.cli.consoles import output_console
from distprune.errors import InputError


class MatrixDtype(str, Enum):
    """What the matrices of a GGUF file are written in."""

    f16 = "f16"
    f32 = "f32"


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="checkpoint in the layout stock or heterogeneous")],
    output: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="GGUF file to write; an existing one is replaced")],
    dtype: Annotated[MatrixDtype, typer.Option(help="dtype of matrices; vectors are f32")] = MatrixDtype.f16,
    pre: Annotated[
        Optional[str],
        typer.Option(
            metavar="NAME|FILE.gguf",
            help="llama.cpp's name for the tokenizer's word splitting, or a file that has it [from tokenizer.json]",
        ),
    ] = None,
) -> None:
    """Write a pruned checkpoint as a GGUF file, for llama.cpp and programs built on it."""
    if find_spec("gguf") is None:
        raise InputError(f"{output}: writing it needs the gguf package. Install it with `pip install gguf`.")
    from distprune.export.gguf_file import export as export_gguf

    export_gguf(directory, output, dtype=dtype.value, pre=pre)
    output_console.print(f"{output}: {output.stat().st_size / 1e9:.2f} GB", highlight=False, markup=False)
