"""SIGINT and SIGTERM: both interrupt a command, and neither does once its outcome is settled."""

from __future__ import annotations

import signal
from typing import Any


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def heed_signals() -> None:
    """From now on SIGTERM ends a command as Ctrl-C does, with a message and an exit status of its own."""
    signal.signal(signal.SIGTERM, interrupt)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as in the background
        signal.signal(signal.SIGINT, interrupt)


def ignore_signals() -> None:
    """From now on neither signal changes how a command ends. Does nothing unless ``heed_signals`` was called."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is interrupt:
            signal.signal(number, signal.SIG_IGN)
