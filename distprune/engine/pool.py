"""Worker actors and the calls that wait for an idle one.

Workers join when there is room for them. A worker, or the node it is on, may vanish at any moment: its call goes back
into the queue for whichever worker is idle next, and Ray restarts it where it finds room. What calls give is fetched to
the driver's node at once, so that nothing but the call itself is ever lost with a worker. A call that takes far longer
than its like is also given to an idle worker; calls are pure, so whichever ends first gives the bytes that the other
would.

A call may be fed in pieces, all of which go to the one worker that has begun it, each as soon as it is there. Of two
such calls the second can live on what the first gives piece by piece, so that both work at once: a pipeline.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from statistics import median
from typing import Any

from distprune.engine.memory import PeakMemory
from distprune.engine.runtime import RayRuntime
from distprune.errors import WorkersLost

# A call survives this many losses of its worker; more mean that the layer itself is what kills it (out of memory).
LOSSES = 4
# An idle worker takes over a call that has run this many times as long as its like usually do.
STRAGGLES = 3
FEWEST_ENDED = 3  # calls of a kind that must have ended before one is said to straggle
LOOK_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Later:
    """An argument that is made when its call starts, and again if it must start again; nothing is held until then."""

    make: Callable[[], Any]


@dataclass(eq=False)
class Call:
    """A worker's method, its arguments and who takes its results.

    Attributes:
        pieces: how many pieces it is fed; 1 is an ordinary call.
        fed: the arguments that each piece adds, as far as they are there.
        taken: the pieces whose results were passed on.
        losses: the workers lost in it.
        copies: the workers at work on it now.
    """

    method: str
    arguments: tuple
    then: Callable[..., None]
    pieces: int = 1
    fed: list[tuple] = field(default_factory=list)
    taken: int = 0
    losses: int = 0
    copies: int = 0

    @property
    def done(self) -> bool:
        return self.taken == self.pieces

    def __str__(self) -> str:
        return f"'{self.method}'" + (f" of layer {self.arguments[0]}" if self.arguments else "")


@dataclass(frozen=True)
class Share:
    """A worker's next or present piece of a call."""

    worker: Any
    call: Call
    piece: int = 0

    @property
    def is_fed(self) -> bool:
        return self.piece < len(self.call.fed)

    @property
    def kind(self) -> tuple[str, int]:
        """What takes about as long."""
        return self.call.method, self.piece


@dataclass(frozen=True)
class Running:
    """A share at work: since when, and its results to be."""

    share: Share
    results: list[Any]
    since: float


class WorkerPool:
    """Workers take queued calls as they fall idle; a worker counts from the moment it is up, so none is waited for."""

    def __init__(self, runtime: RayRuntime, count: int):
        self._runtime = runtime
        self._queue: deque[Call] = deque()
        self._running: dict[Any, Running] = {}
        self._hungry: list[Share] = []  # workers that have begun a call whose next piece is not there yet
        self._took: dict[tuple[str, int], list[float]] = {}
        self._starting: dict[Any, Any] = {}
        self._idle: deque[Any] = deque()
        self.workers = [runtime.start_worker() for _ in range(count)]
        for worker in self.workers:
            self._await(worker)

    def are_up(self, count: int, patience: float | None) -> bool:
        """Whether so many workers are up within ``patience`` seconds; None waits until they are."""
        return len(self._runtime.wait(list(self._starting), count, patience)) >= count

    def submit(self, then: Callable[..., None], method: str, *arguments: Any) -> None:
        """Queue the workers' ``method(*arguments)``; :meth:`run` calls ``then`` with its results.

        An argument may be a :class:`Later`.
        """
        self._enqueue(Call(method, arguments, then, fed=[()]))

    def submit_pieces(self, then: Callable[..., None], pieces: int, method: str, *arguments: Any) -> Call:
        """Queue a call that :meth:`feed` feeds: ``method(*arguments, *piece)`` for each piece in turn, on one worker.

        ``then`` is called with the results of each piece, in their order and once, whoever is lost in between.
        """
        call = Call(method, arguments, then, pieces)
        self._enqueue(call)
        return call

    def feed(self, call: Call, *piece: Any) -> None:
        """Give a call its next piece."""
        call.fed.append(piece)
        for share in [share for share in self._hungry if share.call is call]:
            self._hungry.remove(share)
            self._go_on(share)

    def put(self, value: Any) -> Any:
        """A value as an argument that many calls can share."""
        return self._runtime.put(value)

    def run(self) -> None:
        """Wait for all calls, in no fixed order, and for those that are submitted meanwhile.

        A worker gets its next call before the results of the last are looked at, and nothing here holds on to them.

        Raises:
            InputError: a worker found bad input.
            WorkersLost: a call lost too many workers.
            ray.exceptions.RayError: a call failed otherwise.
        """
        while self._queue or self._hungry or any(not running.share.call.done for running in self._running.values()):
            self._feed_the_queue_first()
            ended = self._runtime.wait([*self._running, *self._starting], timeout=LOOK_EVERY)
            if not ended:
                self._take_over_stragglers()
            elif ended[0] in self._starting:
                self._runtime.fetch(ended)
                self._employ(self._starting.pop(ended[0]))
            else:
                self._finish(self._running.pop(ended[0]))

    def _finish(self, running: Running) -> None:
        share, call = running.share, running.share.call
        try:
            values = self._runtime.fetch(running.results)
        except self._runtime.lost as error:
            call.copies -= 1
            self._await(share.worker)
            if not call.done and not call.copies:
                self._put_back(call, error)
            return
        self._took.setdefault(share.kind, []).append(self._runtime.now() - running.since)
        is_new = share.piece == call.taken
        call.taken += is_new
        if call.done:
            self._leave(share)
        else:
            self._go_on(Share(share.worker, call, share.piece + 1))
        if is_new:
            call.then(*values)

    def _go_on(self, share: Share) -> None:
        """Start the share, or keep its worker waiting for what it is to be fed."""
        if share.is_fed:
            self._start(share)
        else:
            self._hungry.append(share)

    def _leave(self, share: Share) -> None:
        """A worker ends its part in a call, and so do those that wait to go on with it once it is done."""
        share.call.copies -= 1
        self._employ(share.worker)
        if share.call.done:
            for other in [other for other in self._hungry if other.call is share.call]:
                self._hungry.remove(other)
                self._leave(other)

    def _feed_the_queue_first(self) -> None:
        """Let a worker off that waits for a piece, where all do and none is left for the call that would give it."""
        if self._queue and self._hungry and not self._running:
            share = self._hungry.pop()
            self._queue.append(share.call)
            self._leave(share)

    def _take_over_stragglers(self) -> None:
        for running in list(self._running.values()):
            took, call = self._took.get(running.share.kind, []), running.share.call
            usual = median(took) if len(took) >= FEWEST_ENDED else inf
            late = self._runtime.now() - running.since > STRAGGLES * max(usual, LOOK_EVERY)
            if self._idle and late and call.copies == 1 and not call.done:
                self._begin(self._idle.popleft(), call)

    def _enqueue(self, call: Call) -> None:
        self._queue.append(call)
        self._dispatch()

    def _employ(self, worker: Any) -> None:
        self._idle.append(worker)
        self._dispatch()

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            self._begin(self._idle.popleft(), self._queue.popleft())

    def _await(self, worker: Any) -> None:
        self._starting[self._runtime.call(worker, "ready")[0]] = worker

    def _begin(self, worker: Any, call: Call) -> None:
        call.copies += 1
        self._go_on(Share(worker, call))

    def _start(self, share: Share) -> None:
        arguments = *share.call.arguments, *share.call.fed[share.piece]
        arguments = [argument.make() if isinstance(argument, Later) else argument for argument in arguments]
        results = self._runtime.call(share.worker, share.call.method, arguments)
        self._running[results[0]] = Running(share, results, self._runtime.now())

    def _put_back(self, call: Call, error: Exception) -> None:
        call.losses += 1
        if call.losses > LOSSES:
            raise WorkersLost(
                f"{call} lost {call.losses} workers in a row, most likely for lack of memory. "
                f"Take fewer --workers or a smaller --micro-batch. Ray says: {str(error).strip()}"
            ) from error
        self._queue.appendleft(call)
        self._dispatch()

    def peak_memory(self) -> list[PeakMemory]:
        """Peak memory of every worker that is up."""
        peaks = []
        for results in [self._runtime.call(worker, "peak_memory") for worker in self._idle]:
            with suppress(*self._runtime.lost):
                peaks += self._runtime.fetch(results)
        return peaks

    def shutdown(self) -> None:
        self._runtime.stop(self.workers, list(self._starting))
