"""A cluster that exists in numbers alone: the engine's own scheduler, on a clock that jumps from event to event.

The pool and the stages are those of a real run. Only what :mod:`distprune.engine.scheduler.runtime` does is replaced: calls take
the seconds that were measured for them, and give nothing but what the stages look at.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import singledispatchmethod
from math import inf
from typing import Any

import numpy as np
from torch import Tensor

from distprune.checkpoint import WrittenFile
from distprune.config import PruneConfig
from distprune.engine.run.journal import Journal
from distprune.engine.run.preflight import MERGED_AT_ONCE
from distprune.engine.run.write_behind import Add
from distprune.engine.scheduler.nodes import Node
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.stages.checking import Check
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.dense_pass import DensePass
from distprune.engine.stages.merging import MergeShards
from distprune.engine.stages.pruning_pass import PruningPass
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.check_tasks import CheckLayer, CheckOuter
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.pass_tasks import CloseLayer, Embed, OpenForward, Sweep
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.report import Report
from distprune.engine.worker.task import Task
from distprune.engine.worker.write_tasks import Merge
from distprune.layers.shapes import LayerShape

HOUR = 3600.0
SHARD_BYTES = PruneConfig.model_fields["max_shard_size"].default
NOWHERE = Node("", "", "", None, 0)
#: Values, seconds at work, and bytes moved.
Done = tuple[list[Any], float, float]


@dataclass(frozen=True)
class Costs:
    """What tasks of one layer take, in seconds; sizes in bytes.

    Attributes:
        start: until a worker is up.
        check: reading a layer's weights and looking at them.
        read: a layer's weights, from disk to the device.
        forward: all samples through the layer.
        dense_statistics: the moments of the dense pass, beside the forward pass.
        profile: what the method then solves.
        statistics: the moments of the pruning pass, beside the forward pass.
        carried: whether these are collected in the dense pass where a layer begins a block.
        solve: pruning the layer.
        states: the hidden states of all samples.
        pruned: a pruned layer.
    """

    start: float
    check: float
    read: float
    forward: float
    dense_statistics: float
    profile: float
    statistics: float
    carried: bool
    solve: float
    states: int
    pruned: int

    def on_samples(self, share: float) -> Costs:
        """The costs with that share of the samples: solves and weights stay, all else grows with them."""
        grown = ("forward", "dense_statistics", "statistics")
        seconds = {name: share * getattr(self, name) for name in grown}
        return replace(self, **seconds, states=round(share * self.states))


@dataclass(frozen=True)
class Machines:
    """The cluster.

    Attributes:
        workers: how many there are, each alike.
        losses: of a worker, in an hour, on average.
        replaced: seconds until a lost worker's place is taken, its start not counted.
        transfer: bytes a second between a node and the driver's.
        disk: bytes a second that the driver writes.
        worker_disk: bytes a second that a worker writes to the output's file system, or reads there; None where the
            driver alone writes.
        shared_disk: bytes a second that this file system gives all workers together.
    """

    workers: int
    losses: float = 0.0
    replaced: float = 180.0
    transfer: float = 5e9
    disk: float = 1e9
    worker_disk: float | None = None
    shared_disk: float = inf

    @property
    def writing(self) -> float | None:
        """Bytes a second that a worker writes while all others do."""
        return self.worker_disk and min(self.worker_disk, self.shared_disk / self.workers)


@dataclass(frozen=True)
class Pass:
    """What is run: a model's layers over samples in micro-batches, pruned in blocks."""

    layers: int
    block_length: int
    samples: int
    micro_batch: int


class Vanished(Exception):
    """The worker of a call is gone."""


@dataclass(eq=False)
class SimulatedWorker:
    """Up or on its way until ``dies``, and at work until ``free``; ``process`` counts those it has had, one after the
    other."""

    up: float
    dies: float
    free: float = 0.0
    process: int = 0
    opened: tuple[int, int] | None = None  # by which process which layer


@dataclass(frozen=True, eq=False)
class Result:
    """What a call gives, or why not, and when."""

    at: float
    value: Any
    moved: float = 0.0


class SimulatedRuntime:
    """Does what :class:`~distprune.engine.scheduler.runtime.RayRuntime` does, in no time at all."""

    lost = (Vanished,)

    def __init__(self, costs: Costs, machines: Machines, run: Pass, seed: int = 0):
        self.costs, self.machines, self.run = costs, machines, run
        self.clock, self.losses, self.busy = 0.0, 0, 0.0
        self.written = 0.0  # when all that has come so far is on disk
        self._random = random.Random(seed)

    def start_worker(self, number: int, avoided: Collection[str] = ()) -> SimulatedWorker:
        return SimulatedWorker(up=self.costs.start, dies=self._lifetime(self.costs.start))

    def _lifetime(self, begins: float) -> float:
        rate = self.machines.losses / HOUR
        return begins + self._random.expovariate(rate) if rate else inf

    def ready(self, worker: SimulatedWorker) -> Result:
        return self._take(worker, [NOWHERE], 0.0, 0.0)[0]

    def call(self, worker: SimulatedWorker, task: Task, values: Sequence[Any]) -> list[Result]:
        self._replace_if_dead(worker)
        return self._take(worker, *self._done(type(task)(*values), worker))

    def _take(self, worker: SimulatedWorker, values: Sequence[Any], seconds: float, moved: float) -> list[Result]:
        """The results of what a worker does for so many seconds as soon as it is free, bytes moved aside."""
        self._replace_if_dead(worker)
        begins = max(self.clock, worker.up, worker.free)
        ends = begins + seconds + moved / self.machines.transfer
        if worker.dies < ends:
            self.losses += begins < worker.dies  # what waited behind a lost call is not another one
            worker.free = worker.dies
            return [Result(worker.dies, Vanished())]
        self.busy += ends - begins
        worker.free = ends
        return [Result(ends, value, moved) for value in values]

    def _replace_if_dead(self, worker: SimulatedWorker) -> None:
        while worker.dies <= self.clock:
            worker.up = worker.dies + self.machines.replaced + self.costs.start
            worker.dies = self._lifetime(worker.up)
            worker.process += 1

    def wait(self, results: Sequence[Result], count: int = 1, timeout: float | None = None) -> list[Result]:
        ended = sorted(results, key=lambda result: result.at)[:count]
        self.clock = max(self.clock, min(ended[-1].at, inf if timeout is None else self.clock + timeout))
        return [result for result in ended if result.at <= self.clock]

    def draining(self) -> Mapping[str, float]:
        return {}

    def holds_results_of(self, site: Node) -> bool:
        return False  # a copy more on the driver's node is not simulated

    def fetch(self, results: Sequence[Result]) -> list[Any]:
        """Also writes what came to disk, behind: as soon as what came before has been written, which it waits for."""
        if isinstance(results[0].value, Vanished):
            raise results[0].value
        if results[0].moved:
            self.clock = max(self.clock, self.written)
            self.written = self.clock + results[0].moved / self.machines.disk
        return [result.value for result in results]

    def put(self, value: Any) -> Any:
        return value

    def get(self, put: Sequence[Any]) -> list[Any]:
        return list(put)

    def stop(self, workers: Sequence[SimulatedWorker], starting: Sequence[Result]) -> None:
        pass

    @contextmanager
    def write_behind(self) -> Iterator[Add]:
        """Yields what writes at once: a disk has its own time, which is reckoned where something is written."""
        yield lambda write: write()

    def now(self) -> float:
        return self.clock

    # ---------------------------------------------------------------- the tasks: values, seconds, bytes

    @singledispatchmethod
    def _done(self, task: Task, worker: SimulatedWorker) -> Done:
        """What a task gives, and what it takes; most of those that are not below are passed over in no time."""
        return [None], 0.0, 0.0

    @_done.register(CheckLayer)
    @_done.register(CheckOuter)
    def _(self, task: Task, worker: SimulatedWorker) -> Done:
        return [None], self.costs.check, 0.0

    @_done.register
    def _(self, task: Embed, worker: SimulatedWorker) -> Done:
        return [task.tokens], 0.0, self.costs.states

    @_done.register
    def _(self, task: OpenForward, worker: SimulatedWorker) -> Done:
        worker.opened = worker.process, task.index
        return [None], self.costs.read, 0.0

    @_done.register
    def _(self, task: Sweep, worker: SimulatedWorker) -> Done:
        if worker.opened != (worker.process, task.index):
            return [Vanished()], 0.0, 0.0
        part, costs = len(task.hidden_states.array) / self.run.samples, self.costs
        statistics = costs.dense_statistics + self._is_carried(task.index) * costs.statistics
        return [task.hidden_states], part * (costs.forward + statistics), part * costs.states

    @_done.register
    def _(self, task: CloseLayer, worker: SimulatedWorker) -> Done:
        if worker.opened != (worker.process, task.index):
            return [Vanished()], 0.0, 0.0
        return [{}, {}], self.costs.profile, 0.0

    @_done.register
    def _(self, task: Prune, worker: SimulatedWorker) -> Done:
        costs = self.costs
        observed = 0.0 if self._is_carried(task.index) else costs.forward + costs.statistics
        seconds = costs.read + observed + costs.solve + task.propagates * costs.forward
        moved = task.propagates * costs.states
        if writing := self.machines.writing:
            seconds += costs.pruned / writing
        else:
            moved += costs.pruned
        output = task.hidden_states if task.propagates else None
        return [Finished({}, None), output, Report({}, [])], seconds, moved

    @_done.register
    def _(self, task: Merge, worker: SimulatedWorker) -> Done:
        writing, size = self.machines.writing, len(task.parts) * self.costs.pruned
        if writing is None:
            return [None], 0.0, 0.0
        return [WrittenFile("", size)], 2 * size / writing, 0.0

    def merge_here(self, size: int) -> None:
        """The driver reads parts of that size and writes their shard."""
        self.clock = max(self.clock, self.written) + 2 * size / self.machines.disk

    def _is_carried(self, index: int) -> bool:
        return self.costs.carried and index % self.run.block_length == 0


class MemoryJournal:
    """A journal of a run that nobody goes on with."""

    def __init__(self):
        self._entries: dict[str, Mapping[str, Tensor]] = {}

    def write(self, entry: str, report: Any = None, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._entries[entry] = tensors or {}

    def tensors(self, entry: str) -> Mapping[str, Tensor]:
        return self._entries.get(entry, {})

    stored_tensors = tensors

    def remove(self, entry: str) -> None:
        self._entries.pop(entry, None)

    def has(self, entry: str) -> bool:
        return entry in self._entries

    count_first = Journal.count_first


@dataclass(frozen=True)
class Outcome:
    """How a simulated run went: its seconds, the workers' busy seconds together, and the calls lost with workers."""

    seconds: float
    busy: float
    losses: int


def shards_of(costs: Costs, run: Pass) -> dict[str, list[str]]:
    """The shards that several layers are merged into; one of a single layer is that layer's file, moved."""
    each = max(1, SHARD_BYTES // costs.pruned)
    layers = [str(index) for index in range(run.layers)]
    groups = [layers[start : start + each] for start in range(0, run.layers, each)]
    return {str(number): parts for number, parts in enumerate(groups) if len(parts) > 1}


def simulate(costs: Costs, machines: Machines, run: Pass, seed: int = 0) -> Outcome:
    """Check, dense pass, pruning and assembly on a cluster, by the real scheduler.

    Embedding and head are left out: two tensors among hundreds.
    """
    runtime = SimulatedRuntime(costs, machines, run, seed)
    pool, progress = WorkerPool(runtime, min(machines.workers, run.layers)), Progress()
    context = RunContext(pool, progress, run.layers, MemoryJournal(), run.block_length, run.micro_batch)
    Check(context).run()
    profiles = DensePass(context, np.zeros((run.samples, 1), np.int32)).run()
    shapes = [LayerShape(None, None)] * run.layers
    PruningPass(context, shapes, profiles, lambda *_: None).run(())
    shards = shards_of(costs, run)

    def merge_here(shard: str) -> None:
        runtime.merge_here(len(shards[shard]) * costs.pruned)

    MergeShards(context, min(machines.workers, MERGED_AT_ONCE), lambda *_: None, merge_here).run(shards)
    return Outcome(max(runtime.clock, runtime.written), runtime.busy, runtime.losses)
