"""Evaluations that ``distprune evaluate --json`` printed, read from a file."""

from __future__ import annotations

from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from upath import UPath

from distprune.errors import InputError
from distprune.evaluation.side_by_side import ModelEvaluation

ADVICE = "Give a file with what distprune evaluate DENSE PRUNED --json printed."


def read_evaluations(file: Path | UPath) -> list[ModelEvaluation]:
    """Read the evaluations that a file holds.

    Raises:
        InputError: there is no such file, or it holds something else.
    """
    try:
        found = TypeAdapter(list[ModelEvaluation]).validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"--evaluation {file}: can't be read ({error.strerror or error}). {ADVICE}") from None
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"])) or "the file"
        raise InputError(f"--evaluation {file}: {place}: {error.errors()[0]['msg']}. {ADVICE}") from None
    if not found:
        raise InputError(f"--evaluation {file}: holds no model. {ADVICE}")
    return found
