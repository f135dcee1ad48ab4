"""What a command that fails prints, and the status that it exits with."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from distprune.cli.consoles import error_console
from distprune.cli.interrupts import ignore_signals
from distprune.errors import GateFailed, InputError, RunFailed

FAILED = 1
BAD_INPUT = 2
GATE_FAILED = 3
INTERRUPTED = 130


def exits_with_status(command: Callable[..., None]) -> Callable[..., None]:
    """The command that prints an expected error's message alone, without a traceback, and exits with its status.

    Bad input is 2, a run that failed and can be resumed 1, a pipeline without a model that passes its gate 3, and an
    interrupt 130. All other exceptions are mistakes of ours and keep their tracebacks.
    """

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (InputError, RunFailed) as error:
            error_console.print(f"distprune: {error}", style="red", markup=False, highlight=False)
            raise typer.Exit(status_of(error)) from None
        except KeyboardInterrupt:
            ignore_signals()
            message = "distprune: interrupted. Run the same command again: a run resumes where it stopped."
            error_console.print(message, style="red")
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def status_of(error: InputError | RunFailed) -> int:
    if isinstance(error, InputError):
        return BAD_INPUT
    return GATE_FAILED if isinstance(error, GateFailed) else FAILED
