"""``distprune calibrate``."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from distprune import api
from distprune.cli.consoles import output_console
from distprune.cli.options import DTYPES, SOURCE, Field, Model, Revision, TrustRemoteCode


def calibrate(
    model: Model,
    output: Annotated[str, typer.Option("--output", "-o", help="Arrow file to write")],
    text: Annotated[Optional[list[str]], typer.Option(help=f"{SOURCE}; repeatable")] = None,
    field: Field = None,
    samples: Annotated[int, typer.Option(help="number of windows")] = 128,
    sequence_length: Annotated[int, typer.Option(help="tokens in each window")] = 128,
    seed: Annotated[int, typer.Option(help="seed for choosing or generating windows")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda; for generating samples and --cover-experts")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"{DTYPES}; for generating samples and --cover-experts")] = "auto",
    cover_experts: Annotated[
        bool, typer.Option("--cover-experts", help="add windows for experts that the others seldom reach")
    ] = False,
    revision: Revision = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Make a calibration set from texts or, without --text, from samples that the model generates."""
    calibration = api.calibrate(
        model,
        output,
        text=text or (),
        field=field,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
        cover_experts=cover_experts,
    )
    rows, length = calibration.tokens.shape
    output_console.print(f"{output}: {rows} windows of {length} tokens", highlight=False)
