"""The report in the folder of a run's result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from upath import UPath

from distprune.checkpoint import write_text
from distprune.engine import load_record
from distprune.engine.run.record import CONFIG_FILE, LOG_FILE, REPORT_FILE
from distprune.evaluation import ModelEvaluation
from distprune.reporting.pages.run_page import RunMaterial, run_page
from distprune.reporting.pages.timeline import read_events


def draw_report(
    folder: Path | UPath, evaluations: Sequence[ModelEvaluation] = (), output: Path | UPath | None = None
) -> Path | UPath:
    """Draw the report of the run whose result lies in ``folder``.

    Args:
        folder: has the record, and beside it the configuration and the log, which may be missing.
        evaluations: of the dense and the pruned model.
        output: the file to write; by default report.html in the folder.

    Returns:
        The file.

    Raises:
        InputError: the folder holds no record.
    """
    record, events = load_record(folder), read_events(text_of(folder / LOG_FILE))
    output = output or folder / REPORT_FILE
    write_text(output, run_page(RunMaterial(record, text_of(folder / CONFIG_FILE), events, evaluations)))
    return output


def text_of(file: Path | UPath) -> str:
    """What the file says; nothing where there is none."""
    return file.read_text(encoding="utf-8") if file.is_file() else ""
