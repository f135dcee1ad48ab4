"""The report of a comparison, in a file."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distprune.checkpoint import write_text
from distprune.comparison import ComparisonRow
from distprune.engine.run.record import REPORT_FILE
from distprune.errors import InputError

LOGGER = logging.getLogger("distprune")


@contextmanager
def comparison_report(given: str | Path | None, keep: Path | None) -> Iterator[list[ComparisonRow]]:
    """Yields a list to fill with rows, of which a report is drawn at the end, also where a later run has failed.

    Args:
        given: the file to write; by default report.html in ``keep``, or none at all without that.

    Raises:
        InputError: the file can't be written there.
    """
    file = writable(Path(given)) if given else keep and keep / REPORT_FILE
    rows: list[ComparisonRow] = []
    try:
        yield rows
    finally:
        if file and rows:
            draw(rows, file)


def writable(file: Path) -> Path:
    """The file, if it can be written.

    Raises:
        InputError: its folder is missing, or it is one itself.
    """
    if file.is_dir() or not file.parent.is_dir():
        raise InputError(f"--report {file}: give a file in a folder that exists.")
    return file


def draw(rows: list[ComparisonRow], file: Path) -> None:
    """Write the report; where that fails, a warning says so, and the rows are not lost."""
    try:
        # Until here, what draws charts would count as the memory of the runs that are compared.
        from distprune.reporting.pages.comparison_page import comparison_page

        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, comparison_page(rows))
    except Exception as error:
        LOGGER.warning("The report can't be drawn at %s (%s: %s).", file, type(error).__name__, error)
