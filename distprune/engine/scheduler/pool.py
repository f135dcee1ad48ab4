"""Worker actors and the calls that wait for an idle one.

Workers join when there is room for them. A worker, or the node it is on, may vanish at any moment: its call goes back
into the queue for whichever worker is idle next, and Ray restarts it where it finds room. What calls give is fetched to
the driver's node at once, so that nothing but the call itself is ever lost with a worker. A call that takes far longer
than its like is also given to an idle worker; calls are pure, so whichever ends first gives the bytes that the other
would. A worker whose node is about to go takes no further calls, and leaves as soon as its present one is done, or when
that can't be done in time.

A call may have several steps, all by the one worker that has begun it and each as soon as it is known. Of two such
calls the second can live on what the first gives step by step, so that both go on at once: a pipeline. A step's
values are prefetched while the one before it runs, so that they are there when its turn comes.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from distprune.engine.run.write_behind import Add
from distprune.engine.scheduler.draining import Draining
from distprune.engine.scheduler.durations import Durations
from distprune.engine.scheduler.nodes import Nodes, Requirements
from distprune.engine.scheduler.runtime import RayRuntime
from distprune.engine.scheduler.worker_registry import WorkerRegistry
from distprune.engine.telemetry.process_memory import PeakMemory
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.task import Task
from distprune.errors import WorkersLost

# A call survives this many losses of its worker; more mean that the layer itself is what kills it (out of memory).
LOSSES = 4
# An idle worker takes over a call that has run this many times as long as its like usually do.
STRAGGLES = 3
LOOK_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Step:
    """A task and who takes its results."""

    task: Task
    then: Callable[..., None]


@dataclass(eq=False)
class Call:
    """Steps that one worker takes one after the other.

    Attributes:
        order: its place in the queue. It depends on no call that was queued after it.
        length: how many steps it has.
        steps: those that are known.
        taken: the steps whose results were passed on.
        losses: the workers lost in it.
        copies: the workers at work on it now.
    """

    order: int
    length: int
    steps: list[Step] = field(default_factory=list)
    taken: int = 0
    losses: int = 0
    copies: int = 0

    @property
    def done(self) -> bool:
        return self.taken == self.length

    def kinds(self, number: int) -> list[str]:
        """Of the tasks from this step on; those that are not known yet are taken to be as the last that is."""
        known = [step.task.kind() for step in self.steps]
        return (known + known[-1:] * (self.length - len(known)))[number:]


@dataclass(frozen=True)
class Attempt:
    """A worker's next or present step of a call."""

    worker: Any
    call: Call
    number: int = 0

    @property
    def is_known(self) -> bool:
        return self.number < len(self.call.steps)

    @property
    def step(self) -> Step:
        return self.call.steps[self.number]

    @property
    def task(self) -> Task:
        return self.step.task


@dataclass(frozen=True)
class Prefetched:
    """A step that its worker has been told: the values of its task, and its results to be."""

    values: list[Any]
    results: list[Any]


@dataclass(frozen=True)
class InFlight:
    """An attempt at work, and since when."""

    attempt: Attempt
    results: list[Any]
    since: float


class WorkerPool:
    """Workers take queued calls as they fall idle; a worker counts from the moment it is up, so none is waited for."""

    def __init__(
        self,
        runtime: RayRuntime,
        count: int,
        progress: Progress | None = None,
        requirements: Requirements | None = None,
    ):
        self._runtime = runtime
        self._registry = WorkerRegistry(runtime, Nodes(requirements or Requirements()), progress or Progress())
        self._orders = itertools.count()
        self._queue: list[Call] = []
        self._in_flight: dict[Any, InFlight] = {}
        self._prefetched: dict[Any, Prefetched] = {}  # by worker, the step after its present one
        self._waiting: list[Attempt] = []  # workers whose call's next step is not known yet
        self._durations = Durations()
        self._draining = Draining(runtime, self._registry)
        self._starting: dict[Any, Any] = {}
        self._at_hand: dict[int, Any] = {}  # by its id, where a value that was just fetched lies on this node
        self._idle: deque[Any] = deque()
        self.workers = self._registry.workers
        for _ in range(count):
            self._await(self._registry.ask())

    def are_up(self, count: int, patience: float | None) -> bool:
        """Whether so many workers are up, and idle, within ``patience`` seconds; None waits until they are."""
        start = self._runtime.now()
        while len(self._idle) < count:
            timeout = None if patience is None else max(0.0, start + patience - self._runtime.now())
            if not (ready := self._runtime.wait(list(self._starting), timeout=timeout)):
                return False
            self._greet(ready[0])
        return True

    def submit(self, task: Task, then: Callable[..., None]) -> None:
        """Queue a task; :meth:`run` calls ``then`` with its results."""
        self._enqueue(Call(next(self._orders), 1, [Step(task, then)]))

    def submit_steps(self, length: int) -> Call:
        """Queue a call of so many steps, which :meth:`add_step` tells as they become known.

        They may live on the results of calls that were queued before, not of later ones.
        """
        call = Call(next(self._orders), length)
        self._enqueue(call)
        return call

    def add_step(self, call: Call, task: Task, then: Callable[..., None]) -> None:
        """Tell a call its next step; ``then`` gets its results once, whoever is lost in between."""
        call.steps.append(Step(task, then))
        for attempt in [attempt for attempt in self._waiting if attempt.call is call]:
            self._waiting.remove(attempt)
            self._go_on(attempt)
        for flight in [flight for flight in self._in_flight.values() if flight.attempt.call is call]:
            self._prefetch_next(flight.attempt)

    def put(self, value: Any) -> Any:
        """A value as an argument that many calls can attempt.

        What a worker on this node has just given is passed on as it lies there, without a copy.
        """
        return self._at_hand.get(id(value)) or self._registry.gives(value)

    def get(self, put: Sequence[Any]) -> list[Any]:
        """Values that were put."""
        return self._runtime.get(put)

    def write_behind(self) -> AbstractContextManager[Add]:
        """What takes writes while this goes on, one at a time; see :func:`~distprune.engine.run.write_behind`."""
        return self._runtime.write_behind()

    def run(self) -> None:
        """Wait for all calls, in no fixed order, and for those that are submitted meanwhile.

        A worker gets its next call before the results of the last are looked at, and nothing here holds on to them.

        Raises:
            InputError: a worker found bad input.
            WorkersLost: a call lost too many workers.
            ray.exceptions.RayError: a call failed otherwise.
        """
        while self._queue or self._waiting or any(not flight.attempt.call.done for flight in self._in_flight.values()):
            self._look_for_draining_nodes()
            ended = self._runtime.wait([*self._in_flight, *self._starting], timeout=LOOK_EVERY)
            if not ended:
                self._take_over_stragglers()
            elif ended[0] in self._starting:
                self._greet(ended[0])
            else:
                self._finish(self._in_flight.pop(ended[0]))

    def _finish(self, flight: InFlight) -> None:
        attempt, call = flight.attempt, flight.attempt.call
        try:
            values = self._runtime.fetch(flight.results)
        except self._runtime.lost as error:
            self._registry.lose(attempt.worker)
            if self._draining.is_leaving(attempt.worker):
                self._send_away(attempt.worker)
            else:
                self._count_loss(attempt, error)
                self._registry.comes_back(attempt.worker)
                self._await(attempt.worker)
            self._give_back(attempt)
            return
        seconds = self._runtime.now() - flight.since
        self._durations.add(attempt.task.kind(), seconds)
        self._registry.ends(attempt.worker, seconds, values)
        is_new = attempt.number == call.taken
        call.taken += is_new
        if call.done:
            self._leave(attempt)
        else:
            self._go_on(Attempt(attempt.worker, call, attempt.number + 1))
        if is_new:
            if self._registry.is_on_this_node(attempt.worker):
                self._at_hand = dict(zip(map(id, values), flight.results, strict=True))
            attempt.step.then(*values)
            self._at_hand = {}

    def _go_on(self, attempt: Attempt) -> None:
        """Take the step, or keep the worker until it is known."""
        if attempt.is_known:
            self._start(attempt)
        else:
            self._waiting.append(attempt)
            self._dispatch()

    def _leave(self, attempt: Attempt) -> None:
        """A worker ends its part in a call; so do others that wait for its next step, once it is done."""
        attempt.call.copies -= 1
        self._prefetched.pop(attempt.worker, None)
        self._employ(attempt.worker)
        if attempt.call.done:
            for other in [other for other in self._waiting if other.call is attempt.call]:
                self._waiting.remove(other)
                self._leave(other)

    def _take_over_stragglers(self) -> None:
        for flight in list(self._in_flight.values()):
            usual, call = self._durations.usual(flight.attempt.task.kind()), flight.attempt.call
            late = self._runtime.now() - flight.since > STRAGGLES * max(usual, LOOK_EVERY)
            if late and call.copies == 1 and not call.done and (worker := self._worker_for(call)):
                self._begin(worker, call)

    def _look_for_draining_nodes(self) -> None:
        """Workers there leave as soon as they have nothing to do, or can't do it in time; others are asked for."""
        if (found := self._draining.look()) is None:
            return
        for worker in found:
            self._registry.drains(worker, self._draining.seconds_left(worker))
            self._await(self._registry.ask())
            if worker in self._idle:
                self._idle.remove(worker)
                self._send_away(worker)
        for result, flight in list(self._in_flight.items()):
            spent = self._runtime.now() - flight.since
            if self._is_late(flight.attempt, spent) and not self._runtime.wait([result], timeout=0):
                del self._in_flight[result]
                self._give_up(flight.attempt)
        for attempt in [attempt for attempt in self._waiting if self._is_late(attempt)]:
            self._waiting.remove(attempt)
            self._give_up(attempt)

    def _is_late(self, attempt: Attempt, spent: float = 0.0) -> bool:
        """Whether a worker's node is gone before its call is done, by what such calls usually take."""
        if not self._draining.is_leaving(attempt.worker):
            return False
        left = self._durations.left(attempt.call.kinds(attempt.number), spent)
        return attempt.call.done or not self._draining.can_end(attempt.worker, left)

    def _give_up(self, attempt: Attempt) -> None:
        """A worker leaves its call, which others have done or are to do."""
        if not attempt.call.done:
            self._registry.gives_up(attempt.worker)
        self._send_away(attempt.worker)
        self._give_back(attempt)

    def _send_away(self, worker: Any) -> None:
        self._draining.forget(worker)
        self._registry.send_away(worker)

    def _give_back(self, attempt: Attempt) -> None:
        """A worker ends its part in a call, which goes back into the queue unless others are at it."""
        attempt.call.copies -= 1
        self._prefetched.pop(attempt.worker, None)
        if not attempt.call.done and not attempt.call.copies:
            self._enqueue(attempt.call)

    def _enqueue(self, call: Call) -> None:
        insort(self._queue, call, key=lambda queued: queued.order)
        self._dispatch()

    def _greet(self, ready: Any) -> None:
        """A worker is up, and employed unless its device is too small.

        Ray itself starts a worker again that is lost on the way. It gives up where this process's own node is gone.
        """
        try:
            [site] = self._runtime.fetch([ready])
        except self._runtime.lost as error:
            raise WorkersLost(
                "A worker could not be started. See with `ray status` that the cluster is still there, and give the "
                f"same command again. Ray says: {str(error).strip()}"
            ) from error
        worker = self._starting.pop(ready)
        if self._registry.admits(worker, site):
            self._employ(worker)
        elif another := self._registry.replace():
            self._await(another)

    def _employ(self, worker: Any) -> None:
        self._registry.rests(worker)
        if self._draining.is_leaving(worker):
            self._send_away(worker)
            return
        self._idle.append(worker)
        self._dispatch()

    def _dispatch(self) -> None:
        """Begin the first calls in the queue, as far as there are workers for them."""
        while self._queue and (worker := self._worker_for(self._queue[0])):
            self._begin(worker, self._queue.pop(0))

    def _worker_for(self, call: Call) -> Any | None:
        """An idle worker, or else that of the last of the calls after this one that wait for their next step.

        They may be waiting for it; the one that gives way goes back into the queue.
        """
        if self._idle:
            return self._idle.popleft()
        staying = [attempt for attempt in self._waiting if not self._draining.is_leaving(attempt.worker)]
        later = [attempt for attempt in staying if attempt.call.order > call.order]
        if not later:
            return None
        attempt = max(later, key=lambda attempt: attempt.call.order)
        self._waiting.remove(attempt)
        attempt.call.copies -= 1
        if not attempt.call.copies:
            insort(self._queue, attempt.call, key=lambda queued: queued.order)
        return attempt.worker

    def _await(self, worker: Any) -> None:
        self._starting[self._runtime.ready(worker)] = worker

    def _begin(self, worker: Any, call: Call) -> None:
        call.copies += 1
        self._go_on(Attempt(worker, call))

    def _start(self, attempt: Attempt) -> None:
        prefetched = self._prefetched.pop(attempt.worker, None) or self._prefetch(attempt)
        self._registry.begins(attempt.worker, attempt.task, prefetched.values)
        self._in_flight[prefetched.results[0]] = InFlight(attempt, prefetched.results, self._runtime.now())
        self._prefetch_next(attempt)

    def _prefetch(self, attempt: Attempt) -> Prefetched:
        values = attempt.task.values
        return Prefetched(values, self._runtime.call(attempt.worker, attempt.task, values))

    def _prefetch_next(self, attempt: Attempt) -> None:
        """Tell a worker the step after its present one, if it is known; it begins it when it has ended that."""
        following = Attempt(attempt.worker, attempt.call, attempt.number + 1)
        if following.is_known and following.worker not in self._prefetched:
            self._prefetched[following.worker] = self._prefetch(following)

    def _count_loss(self, attempt: Attempt, error: Exception) -> None:
        if attempt.call.done or attempt.call.copies > 1:
            return
        attempt.call.losses += 1
        if attempt.call.losses > LOSSES:
            raise WorkersLost(
                f"{attempt.task} lost {attempt.call.losses} workers in a row, most likely for lack of memory. "
                f"Take fewer --workers or a smaller --micro-batch. Ray says: {str(error).strip()}"
            ) from error

    def peak_memory(self) -> list[PeakMemory]:
        """Peak memory of every worker that is up."""
        return self._registry.peak_memory(self._idle)

    def shutdown(self) -> None:
        self._runtime.stop(self.workers, list(self._starting))
