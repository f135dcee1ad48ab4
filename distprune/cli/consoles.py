"""Where commands print: results on standard output, progress and errors on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from distprune.engine.telemetry.progress import Progress

output_console = Console(soft_wrap=True)
error_console = Console(stderr=True, soft_wrap=True)


def display() -> Progress:
    """Shows progress on standard error, for as long as that can be written."""
    from distprune.engine.telemetry.harmless import Unfailing
    from distprune.reporting import console_progress

    return Unfailing("the display", lambda: console_progress(error_console))
