"""The report beside a result, which no run fails for want of."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from distprune.engine.run.record import REPORT_FILE, DrawReport

LOGGER = logging.getLogger("distprune")


def leave_report(draw: DrawReport, folder: Path, output: Path) -> None:
    """Draw the report of what lies in ``folder`` and is about to be published at ``output``.

    Where that fails there is no report, and a warning says so: all else of the result is there.
    """
    try:
        draw(folder)
    except Exception as error:
        with suppress(Exception):
            (folder / REPORT_FILE).unlink(missing_ok=True)
        LOGGER.warning(
            "The report can't be drawn (%s: %s). The checkpoint is complete; draw the report with: distprune report %s",
            type(error).__name__,
            error,
            output,
        )
