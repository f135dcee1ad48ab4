"""Files written while the driver continues, one after the other in the order in which they came.

Workers wait for the driver whenever it waits for a disk; and what the journal says is true in whatever order it is
written down, as long as that is the order in which things happened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

Add = Callable[[Callable[[], None]], None]


@contextmanager
def write_behind() -> Iterator[Add]:
    """Yields what takes a write and returns at once, or as soon as the one before is done: only one ever waits.

    At the end all have been written. A write that fails is the last; what it raised is raised by the next call, or at
    the end.
    """
    pending: list[Future] = []

    def add(write: Callable[[], None]) -> None:
        while pending:
            pending.pop().result()
        pending.append(thread.submit(write))

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write-behind") as thread:
        yield add
        for last in pending:
            last.result()
