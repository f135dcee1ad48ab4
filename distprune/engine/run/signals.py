"""SIGINT and SIGTERM: what ends a run that the same command resumes, and when they wait."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM does what Ctrl-C does: schedulers and ``ray job stop`` end a run as its user would."""
    with sigterm_as_it_was():
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        yield


@contextmanager
def sigterm_as_it_was() -> Iterator[None]:
    """Whatever sets another handler inside, as joining Ray does, has set it for no longer than that.

    Ray's would end the process with a status that tells nothing.
    """
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def interruptions_held_back() -> Iterator[Callable[[], None]]:
    """Inside, SIGINT and SIGTERM wait; at the end they do what they would have done before.

    Yields what makes them wait again, where something inside has set another handler.
    """
    came: list[int] = []
    with interruptions_noted(came) as wait_again:
        yield wait_again
    for number in came[:1]:
        signal.raise_signal(number)


@contextmanager
def interruptions_noted(came: list[int]) -> Iterator[Callable[[], None]]:
    """Inside, SIGINT and SIGTERM do nothing but add their numbers to ``came``.

    Yields what sees to that again, where something inside has set another handler.
    """
    if threading.current_thread() is not threading.main_thread():  # the only one that signals interrupt
        yield lambda: None
        return
    # A handler that Python doesn't know can't be put back.
    before = {number: handler for number in INTERRUPTIONS if (handler := signal.getsignal(number)) is not None}

    def note() -> None:
        for number in before:
            signal.signal(number, lambda number, _: came.append(number))

    try:
        note()
        yield note
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
