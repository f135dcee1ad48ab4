"""Keeping what a native library prints out of standard output, which may be a log in JSON."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def native_output_on_stderr() -> Iterator[None]:
    """What compiled code prints inside goes to standard error (HiGHS prints a line wherever it repairs a solution)."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        flush(None)
        os.dup2(stdout, 1)
        os.close(stdout)
