"""A pipeline of workers that pass the samples on to each other, piece by piece.

The samples pass stations one after the other, mostly the model's layers. Each worker holds one station: it opens it
ahead of time, gets the samples in pieces of whole micro-batches, each as soon as the station before has passed it on,
and closes the station, by solving for a profile for instance, when the next ones have long been at work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from distprune.engine.scheduler.pool import Call, WorkerPool
from distprune.engine.worker.host_tensor import HostTensor
from distprune.engine.worker.task import Task

# Pieces for every worker: the more, the sooner all of them are at work, and the more calls. Even a single worker works
# on one while the driver passes on the one before.
PIECES_PER_WORKER = 4


@dataclass
class OpenStation:
    """A station between its opening and its closing, and the pieces that it was given so far.

    No worker has opened one whose work is shared: it has no call.
    """

    call: Call | None
    given: list[Any] = field(default_factory=list)


class Relay(ABC):
    """The stations from a first one to the last; subclasses say what happens at each.

    Args:
        stations: how many there are.
        micro_batch: samples that are never parted.
        keeps_end: whether anybody asks for what the last station gives.
        in_one_piece: whether all samples go together, one worker being at work at a time.
    """

    def __init__(
        self,
        pool: WorkerPool,
        stations: int,
        micro_batch: int,
        keeps_end: bool = False,
        in_one_piece: bool = False,
    ):
        self.pool, self.stations, self.micro_batch, self.keeps_end = pool, stations, micro_batch, keeps_end
        self.in_one_piece = in_one_piece
        self._open: dict[int, OpenStation] = {}
        self._end: list[Any] = []

    # ---------------------------------------------------------------- what happens at a station

    @abstractmethod
    def opening(self, station: int) -> Task:
        """What a worker does before any sample is there."""

    @abstractmethod
    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        """What it does with one piece of the samples, which gives what the next station gets; ``piece`` was put."""

    @abstractmethod
    def closing(self, station: int, pieces: int) -> Task:
        """What it does when it has seen all samples."""

    @abstractmethod
    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        """All that a station gets from the one before is there; what the last one gives is kept as one more's."""

    @abstractmethod
    def closed(self, station: int, *results: Any) -> None:
        """A station is closed, with what that gave."""

    def is_shared(self, station: int) -> bool:
        """Whether workers share the work of a station, which then gets all samples in one piece."""
        return False

    def share(self, station: int, piece: Any, pass_on: Callable[..., None], close: Callable[..., None]) -> None:
        """Queue the tasks of a station whose work is shared.

        ``pass_on`` gets what the next station gets, and ``close`` what :meth:`closed` does.
        """
        raise NotImplementedError

    # ---------------------------------------------------------------- how the samples get there

    def carry_through(self) -> None:
        """Wait until all stations are closed. What :meth:`reached` and :meth:`closed` write is written behind."""
        with self.pool.write_behind() as self._write:
            self.pool.run()

    def begin(self, first: int, samples: HostTensor) -> None:
        """Give a station all that it gets at once, in the pieces that the stations after it will get."""
        most = 1 if self.in_one_piece else PIECES_PER_WORKER * len(self.pool.workers)
        self._pieces = split(len(samples.array), self.micro_batch, most)
        self._next = first
        self._open_until(first + self._ahead)
        for piece in self._pieces:
            self._give(first, HostTensor(samples.array[piece], samples.dtype))

    @property
    def _ahead(self) -> int:
        """How many stations are open at once.

        Where samples go in one piece, other workers are not to wait for it: they share what is to be done at a station.
        """
        return 1 if self.in_one_piece else len(self.pool.workers)

    def _open_until(self, end: int) -> None:
        """Let workers open the stations before ``end`` and wait for samples."""
        for station in range(self._next, min(end, self.stations)):
            self._next = station + 1
            if self.is_shared(station):
                self._open[station] = OpenStation(None)
                continue
            self._open[station] = OpenStation(self.pool.submit_steps(1 + len(self._pieces) + 1))
            self._add(station, self.opening(station), lambda _: None)

    def _give(self, station: int, piece: HostTensor) -> None:
        self._open_until(station + 1)
        given, put = self._open[station].given, self.pool.put(piece)
        number = len(given)
        given.append(put)
        if self.is_shared(station):
            self.share(station, put, partial(self._pass_on, station), partial(self._close, station))
            return
        task = self.passing(station, number, self._pieces[number], put)
        self._add(station, task, partial(self._pass_on, station))
        if len(given) == len(self._pieces):
            self._add(station, self.closing(station, len(given)), partial(self._close, station))

    def _add(self, station: int, task: Task, then: Callable[..., None]) -> None:
        self.pool.add_step(self._open[station].call, task, then)

    def _pass_on(self, station: int, piece: HostTensor) -> None:
        following = station + 1
        if following < self.stations:
            self._give(following, piece)
            given = self._open[following].given
        elif self.keeps_end:
            given = self._end
            given.append(self.pool.put(piece))
        else:
            return
        if len(given) == len(self._pieces):
            self._write(partial(self.reached, following, self.pool.get(given)))

    def _close(self, station: int, *results: Any) -> None:
        del self._open[station]
        self._open_until(station + 1 + self._ahead)
        self._write(partial(self.closed, station, *results))


def split(samples: int, micro_batch: int, most: int) -> list[slice]:
    """At most ``most`` runs of samples, as even as whole micro-batches allow."""
    batches = -(-samples // micro_batch)
    count = min(batches, most)
    starts = [micro_batch * (batches * number // count) for number in range(count)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], samples], strict=True)]
