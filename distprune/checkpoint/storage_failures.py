"""What becomes of a write when the file system is full, breaks or stalls."""

from __future__ import annotations

import errno
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from upath import UPath

from distprune.errors import StorageFailed

# What the file system, and not the one who writes, is to blame for, and what helps.
FIXES = {
    errno.ENOSPC: "Free some space there",
    errno.EDQUOT: "Free some space there or raise the quota",
    errno.EFBIG: "Raise the limit on the size of files or give a smaller --max-shard-size",
    errno.EIO: "Repair the file system",
    errno.EROFS: "Make the file system writable again",
    errno.ESTALE: "Mount the file system again",
}
# Seconds after which a write is said to stall.
PATIENCE = 60.0

logger = logging.getLogger(__name__)


@contextmanager
def failures_explained(target: Path) -> Iterator[None]:
    """Inside, `target` is written, or files below it.

    Raises:
        StorageFailed: the file system gave out; names the file and the fix.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        number = error_number(error)
        if number not in FIXES:
            raise
        file = getattr(error, "filename2", None) or getattr(error, "filename", None) or target
        raise StorageFailed(
            f"{file}: {os.strerror(number)}. {FIXES[number]}; the same command resumes from what was done."
        ) from error


@contextmanager
def store_failures_explained(target: UPath) -> Iterator[None]:
    """Inside, `target` is written to an object store.

    Raises:
        StorageFailed: the store does not take it; names the object and the fix.
    """
    try:
        yield
    except Exception as error:  # the clients of stores share no base class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise StorageFailed(
            f"{target}: can't be written ({reason}). Check the network and your access to it; the same command resumes."
        ) from error


def error_number(error: OSError | SafetensorError) -> int | None:
    """The system's number of an error; safetensors has it in the message alone."""
    if isinstance(error, OSError):
        return error.errno
    stated = re.search(r"\(os error (\d+)\)", str(error))
    return stated and int(stated[1])


@contextmanager
def stalls_told(target: Path) -> Iterator[None]:
    """Inside, `target` is written. If that takes long, the log says so; it is waited for all the same."""

    def tell() -> None:
        logger.warning(
            "Writing %s has taken %.0f s so far: its file system stalls. The run waits for it.",
            target,
            PATIENCE,
        )

    watchdog = threading.Timer(PATIENCE, tell)
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()
