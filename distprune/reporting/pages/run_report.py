"""The report in the folder of a run's result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from upath import UPath

from distprune.checkpoint import write_text
from distprune.engine import load_record
from distprune.engine.run.record import CONFIG_FILE, LOG_FILE, REPORT_FILE
from distprune.errors import InputError
from distprune.evaluation import ModelEvaluation
from distprune.reporting.pages.run_page import RunMaterial, run_page
from distprune.reporting.pages.timeline import read_events


def draw_report(
    folder: Path | UPath, evaluation: Path | UPath | None = None, output: Path | UPath | None = None
) -> Path | UPath:
    """Draw the report of the run whose result lies in ``folder``.

    Args:
        folder: has the record, and beside it the configuration and the log, which may be missing.
        evaluation: what ``distprune evaluate --json`` printed of the dense and the pruned model.
        output: the file to write; by default report.html in the folder.

    Returns:
        The file.

    Raises:
        InputError: the folder holds no record, or the evaluation is none.
    """
    record, evaluations = load_record(folder), read_evaluations(evaluation) if evaluation else ()
    events = read_events(text_of(folder / LOG_FILE))
    output = output or folder / REPORT_FILE
    write_text(output, run_page(RunMaterial(record, text_of(folder / CONFIG_FILE), events, evaluations)))
    return output


def text_of(file: Path | UPath) -> str:
    """What the file says; nothing where there is none."""
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def read_evaluations(file: Path | UPath) -> Sequence[ModelEvaluation]:
    """The evaluations that a file holds.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    advice = "Give a file with what distprune evaluate DENSE PRUNED --json printed."
    try:
        found = TypeAdapter(list[ModelEvaluation]).validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"--evaluation {file}: can't be read ({error.strerror or error}). {advice}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise InputError(f"--evaluation {file}: {place}: {error.errors()[0]['msg']}. {advice}") from None
    if not found:
        raise InputError(f"--evaluation {file}: holds no model. {advice}")
    return found
