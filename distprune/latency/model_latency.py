"""Measuring a model that is on disk or on the hub, and writing what was found."""

from __future__ import annotations

from pathlib import Path

import torch

from distprune.calibration.whole_model import checked_device, checked_dtype
from distprune.checkpoint import Checkpoint, resolve_model, write_text
from distprune.errors import InputError
from distprune.families.language_model import language_config
from distprune.hardware import compute_dtype
from distprune.latency.latency_table import LatencyTable
from distprune.latency.measuring_latency import LatencyOptions, OnRound, measure
from distprune.layers.architecture import Architecture
from distprune.storage import make_folder


def measure_model(
    model: str,
    output: Path,
    options: LatencyOptions,
    *,
    device: str,
    dtype: str,
    revision: str | None,
    trust_remote_code: bool,
    on_round: OnRound,
) -> LatencyTable:
    """Measure a model on a device of this machine, and write the table; see :func:`distprune.measure_latency`.

    Raises:
        InputError: an option or the model is unusable.
    """
    where = torch.device(checked_device(device))
    chosen = checked_dtype(dtype)
    if output.is_dir():
        raise InputError(f"--output {output}: is a folder. Give the name of a file to write.")
    checkpoint = Checkpoint.open(resolve_model(model, revision=revision), trust_remote_code)
    architecture = Architecture(language_config(checkpoint.config)[0])
    if not isinstance(chosen, torch.dtype):
        chosen = compute_dtype(architecture.dtype, where).dtype
    table = measure(architecture, options, where, chosen, on_round)
    make_folder(output.parent)
    write_text(output, table.model_dump_json(indent=1) + "\n")
    return table
