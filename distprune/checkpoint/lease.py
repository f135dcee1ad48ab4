"""A lock in an object store, which knows no locks: an object that whoever holds it renews again and again."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from upath import UPath

RENEWED_EVERY = 10.0  # seconds
# Seconds without renewal after which whoever held it is taken for dead.
EXPIRY = 45.0


class Held(Exception):
    """Someone else holds the lease and renews it."""


@contextmanager
def hold_lease(lease: UPath) -> Iterator[None]:
    """Hold a lease; one that nobody renews any more is taken over.

    Two that ask at the same moment are told apart by whose name is there a moment later. Stores without conditional
    writes allow no more.

    Raises:
        Held: someone else does.
    """
    _wait_for_expiry(lease)
    name, ended = uuid.uuid4().hex, threading.Event()
    _renew(lease, name)
    time.sleep(1)
    if not _read(lease).startswith(name):
        raise Held

    def keep() -> None:
        while not ended.wait(RENEWED_EVERY):
            with suppress(Exception):  # what the store can't take now, it may a little later
                _renew(lease, name)

    thread = threading.Thread(target=keep, daemon=True, name="lease")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        with suppress(Exception):
            lease.unlink(missing_ok=True)


def is_held(lease: UPath) -> bool:
    """Whether someone has renewed it lately, by the clocks of both machines."""
    renewed = _read(lease).partition(" ")[2]
    return bool(renewed) and time.time() - float(renewed) < EXPIRY


def _wait_for_expiry(lease: UPath) -> None:
    """Return when nobody holds it. Whoever renews it while this process watches, does, whatever the clocks say."""
    found, began = _read(lease), time.monotonic()
    while found and time.monotonic() - began < EXPIRY:
        if not is_held(lease):
            return
        time.sleep(1)
        if (now := _read(lease)) and now != found:
            raise Held
        found = now


def _renew(lease: UPath, name: str) -> None:
    lease.write_text(f"{name} {time.time():.0f}", encoding="utf-8")


def _read(lease: UPath) -> str:
    try:
        return lease.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
