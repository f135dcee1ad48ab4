"""The run's stages by the engine's own scheduler, on simulated time: every task takes what it was counted to take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distprune.distillation.layerwise import DistillationReport, shuffled_batches, split
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.simulation import Machines, MemoryJournal, Result, SimulatedRuntime, SimulatedWorker
from distprune.engine.stages.checking import Check
from distprune.engine.stages.context import RunContext, mixtures_of
from distprune.engine.stages.dense_pass import DensePass
from distprune.engine.stages.end_to_end import Step
from distprune.engine.stages.gate_learning import GateStep
from distprune.engine.stages.gradient_pass import GradientPass
from distprune.engine.stages.layerwise_distillation import LayerwiseDistillation
from distprune.engine.stages.pruned_passes import measure_again
from distprune.engine.stages.pruning_pass import PruningPass
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.distill_task import Distill
from distprune.engine.worker.end_to_end_tasks import CloseEnd, FoldIn, Forward, OpenDense, OpenStudent, StepOptimizer
from distprune.engine.worker.expert_pass_tasks import (
    BackwardExperts,
    BackwardJoined,
    ForwardExperts,
    ForwardJoined,
    GradientAtExperts,
    ProfileExperts,
    ProfileMixture,
    RouteTokens,
)
from distprune.engine.worker.expert_tasks import PruneAround, PruneExperts
from distprune.engine.worker.gate_tasks import CloseGated, OpenGated
from distprune.engine.worker.host_tensor import HostTensor
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.pass_tasks import Advance, CloseLayer, CloseLoss, OpenBackward, OpenForward
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.report import Report
from distprune.engine.worker.task import Task
from distprune.layers.expert_chunks import in_chunks
from distprune.planning.kernels import EIGEN, FLOAT32, FLOAT64, HALF
from distprune.planning.rehearsal import CloseAfterForward, Done, ForwardOfStudent, Rehearsed
from distprune.planning.scenario import Scenario, TokenSet

#: Sequences that the model writes at once, when it makes its own calibration set.
OWN_SAMPLES_BATCH = 128


@dataclass(frozen=True)
class StagePlan:
    """What a stage takes: floating-point operations by the numbers that they are on, bytes, and seconds."""

    name: str
    half_flops: float
    float32_flops: float
    float64_flops: float
    bytes_read: float
    bytes_stored: float
    bytes_written: float
    seconds: float


@dataclass
class Tally:
    """What the tasks of a stage took, all together."""

    half: float = 0.0
    float32: float = 0.0
    float64: float = 0.0
    read: float = 0.0
    stored: float = 0.0
    written: float = 0.0

    def add(self, rehearsed: Rehearsed, samples: float) -> None:
        """A task with so many samples."""

        def flops(*kinds: str) -> float:
            return rehearsed.on(samples, lambda done: done.counts.flops(*kinds))

        self.half += flops(HALF)
        self.float32 += flops(FLOAT32)
        self.float64 += flops(FLOAT64, EIGEN)
        self.read += rehearsed.on(samples, lambda done: done.counts.read)

    def plus(self, other: Tally, times: float) -> Tally:
        """This and so many times the other."""
        return Tally(*(mine + times * theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    def plan(self, name: str, seconds: float) -> StagePlan:
        figures = self.half, self.float32, self.float64, self.read, self.stored, self.written
        return StagePlan(name, *figures, round(seconds, 3))


class PlannedRuntime(SimulatedRuntime):
    """Workers that take as long as a scenario's tasks are counted to take."""

    def __init__(self, scenario: Scenario):
        rates = scenario.rates
        transfer = rates.store if scenario.cluster.nodes == 1 else rates.network
        machines = Machines(scenario.placement.workers, transfer=transfer, disk=rates.write)
        super().__init__(SimpleNamespace(start=0.0), machines, None)
        self.scenario, self.tally = scenario, Tally()
        self._seconds: dict[Any, tuple[float, float]] = {}

    def fetch(self, results: Sequence[Result]) -> list[Any]:
        return [result.value for result in results]

    def write(self, size: float) -> None:
        """The driver writes so many bytes, behind, as soon as what came before is on disk, which it waits for."""
        self.clock = max(self.clock, self.written)
        self.written = self.clock + size / self.machines.disk
        self.tally.written += size

    def _done(self, task: Task, worker: SimulatedWorker) -> tuple[list[Any], float, float]:
        if isinstance(task, (OpenForward, OpenBackward, OpenStudent, OpenDense, OpenGated)):
            worker.opened = type(task)
        rehearsed, samples = self._rehearsed(task, worker), samples_of(task)
        seconds, moved = self.scenario.rates.call_seconds, 0.0
        if rehearsed is not None:
            seconds += rehearsed.on(samples, self._seconds_of)
            moved = rehearsed.on(samples, lambda done: float(done.given))
            self.tally.add(rehearsed, samples)
        if isinstance(task, (Prune, PruneExperts, Distill, FoldIn)):
            size = self.scenario.pruned_bytes[task.index]
            if isinstance(task, PruneExperts):  # each of as many experts; what is around them is little
                size /= len(in_chunks(task.planned.ffn.count, self.scenario.config.experts_at_once))
            if self.scenario.config.writes != "driver":
                moved -= size
                seconds += size / self.scenario.rates.write
                self.tally.written += size
        moved = max(0.0, moved)
        self.tally.stored += moved
        return stand_ins(task), seconds, moved

    def _seconds_of(self, done: Done) -> float:
        return self.scenario.clock.seconds(done.counts)

    def _rehearsed(self, task: Task, worker: SimulatedWorker) -> Rehearsed | None:
        rehearsal, kind = self.scenario.rehearsal, type(task)
        if task.layer is None:
            return rehearsal.ends().get(kind)
        further = {**rehearsal.further_round(task.layer), **rehearsal.gate_learning(task.layer)}
        if kind in (of_pass := further.get(worker.opened, {})):
            return of_pass[kind]
        if kind is CloseLayer and worker.opened is OpenForward and self.scenario.needs_gradients:
            kind = CloseAfterForward
        if kind is Forward and worker.opened is OpenStudent:
            kind = ForwardOfStudent
        return rehearsal.layer(task.layer).get(kind) or rehearsal.learning(task.layer).get(kind)


class PlannedJournal(MemoryJournal):
    """A journal whose writing takes the driver's disk its time.

    Args:
        runtime: whose clock it is.
        size: bytes of one sample's hidden states.
    """

    def __init__(self, runtime: PlannedRuntime, size: float):
        super().__init__()
        self._runtime, self._size = runtime, size

    def write(self, entry: str, report: Any = None, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().write(entry, report, tensors)
        self._runtime.write(self._size * sum(len(tensor) for tensor in (tensors or {}).values()))


def samples_of(task: Task) -> float:
    """Of a task that runs layers over samples; 1 of others."""
    return next((float(len(value.array)) for value in vars(task).values() if isinstance(value, HostTensor)), 1.0)


def stand_ins(task: Task) -> list[Any]:
    """What a task gives, as far as the stages look at it: for hidden states a row a sample."""
    states = next((value for value in vars(task).values() if isinstance(value, HostTensor)), None)
    finished = Finished({}, None)
    match task:
        case Prune():
            return [finished, states if task.propagates else None, Report({}, [])]
        case GradientAtExperts():
            return [states, states, {}]
        case RouteTokens() | ForwardJoined() | BackwardJoined():
            return [states, {}]
        case ForwardExperts() | BackwardExperts():
            return [[], {}]
        case ProfileExperts() | ProfileMixture():
            return [{}]
        case PruneAround():
            return [finished, {}, states, Report({}, [])]
        case PruneExperts():
            return [{}, [], Report({}, [])]
        case Distill():
            return [finished, DistillationReport([], 0.0, 0.0, True)]
        case FoldIn():
            return [finished]
        case CloseLayer():
            return [{}, {}]
        case StepOptimizer() | CloseGated():
            return [{}]
        case CloseLoss() | CloseEnd():
            return [HostTensor(np.zeros(1), torch.float64)]
    return [states, *[None] * (task.results - 1)]


# ---------------------------------------------------------------- the stages


class SimulatedRun:
    """The stages of a run, one after the other.

    Args:
        scenario: the run.
    """

    def __init__(self, scenario: Scenario):
        self.scenario, self.stages = scenario, []
        self.runtime = PlannedRuntime(scenario)
        self.pool = WorkerPool(self.runtime, scenario.placement.workers)
        size = scenario.hidden_states(TokenSet(1, scenario.calibration.length))
        journal = PlannedJournal(self.runtime, size)
        self.context = RunContext(
            pool=self.pool,
            journal=journal,
            progress=Progress(),
            layers=scenario.layers,
            block_length=scenario.block_length,
            micro_batch=scenario.batch,
            experts_at_once=scenario.config.experts_at_once,
            mixtures=mixtures_of(scenario.architecture.dense_shapes),
            aiming=scenario.aiming,
            rounds=scenario.config.rounds,
        )
        self.tokens = rows(scenario.calibration)

    def run(self) -> list[StagePlan]:
        """The plan of every stage."""
        scenario = self.scenario
        self.stages.append(Tally().plan("start", scenario.rates.start_seconds))
        self._check()
        if scenario.config.calibration is None:
            self._own_samples()
        with self._stage("dense pass"):
            profiles = DensePass(self.context, self.tokens, scenario.needs_gradients, scenario.learns_gates).run()
        if scenario.needs_gradients:
            with self._stage("gradient pass"):
                profiles = GradientPass(self.context, self.tokens).run()
        if scenario.learns_gates:
            with self._stage("gates"):
                self._learn_gates()
        rounds = scenario.config.rounds
        with self._stage("prune"):
            PruningPass(self.context, scenario.shapes, profiles, self._keep, is_last=rounds == 1).run(())
        for number in range(2, rounds + 1):
            with self._stage("measure again"):
                profiles = measure_again(self.context, self.tokens, lambda _: {}, number)
            with self._stage("prune again"):
                PruningPass(self.context, scenario.shapes, profiles, self._keep, is_last=rounds == number).run(())
        if scenario.config.distill:
            with self._stage("distill"):
                self._distill_end_to_end() if scenario.is_end_to_end else self._distill()
        self._assemble()
        return self.stages

    @contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        """What is done inside is a stage, which ends when all is written."""
        begins, self.runtime.tally = self.runtime.clock, Tally()
        yield
        self.runtime.clock = max(self.runtime.clock, self.runtime.written)
        self.stages.append(self.runtime.tally.plan(name, self.runtime.clock - begins))

    def _keep(self, index: int, *_: Any) -> None:
        """A layer is done: the driver writes it, unless its worker has."""
        if self.scenario.config.writes == "driver":
            self.runtime.write(self.scenario.pruned_bytes[index])

    def _check(self) -> None:
        """All workers of a node read from one disk."""
        with self._stage("check"):
            Check(self.context).run()
        scenario, stage = self.scenario, self.stages.pop()
        nodes = min(scenario.cluster.nodes, scenario.placement.workers)
        reading = (scenario.bytes_before + scenario.outer_bytes) / scenario.rates.read / nodes
        self.stages.append(replace(stage, seconds=round(max(stage.seconds, reading), 3)))

    def _own_samples(self) -> None:
        """One worker runs the whole model, a token of all samples at a time: every token reads every weight.

        What a GPU can't hold waits on its host, and goes there for every token.
        """
        scenario, rates, tally = self.scenario, self.scenario.rates, Tally()
        size = scenario.bytes_before + scenario.outer_bytes
        steps = scenario.config.sequence_length * -(-scenario.config.samples // OWN_SAMPLES_BATCH)
        for index in range(scenario.layers):
            tally.add(scenario.rehearsal.layer(index)[Advance], scenario.calibration.samples)
        tally.read = size
        lacking = max(0, size - scenario.cluster.gpu_memory) if scenario.on_gpu else 0
        passing = steps * (size / rates.memory + lacking / rates.link) + size / scenario.clock.reading
        computing = tally.half / rates.half + tally.float32 / rates.float32
        self.stages.append(tally.plan("own samples", scenario.placement.slowdown * (passing + computing)))

    def _distill(self) -> None:
        options, tokens = self.scenario.config.distill, rows(self.scenario.distilled_on)
        LayerwiseDistillation(self.context, tokens, options, lambda index: {}, self._keep).run(())

    def _distill_end_to_end(self) -> None:
        """One step stands for all of them, and one look for all looks."""
        scenario, options = self.scenario, self.scenario.config.distill
        training, held_out = split(scenario.distilled_on.samples, options)
        batches = list(shuffled_batches(len(training), options))
        looks = 2 * len(held_out.split(options.batch))
        micro_batch = options.micro_batch(scenario.batch)
        for rate, times, samples in ((1.0, len(batches), batches[0]), (None, looks, held_out[: options.batch])):
            students = [OpenStudent(index, {}, {}) for index in range(scenario.layers)]
            with self._for_all(times):
                Step(self.pool, students, micro_batch, rate).run(rows(TokenSet(len(samples), 1)))
        for index in range(scenario.layers):
            self.pool.submit(FoldIn(index, {}, {}), lambda _, index=index: self._keep(index))
        self.pool.run()

    def _learn_gates(self) -> None:
        """One step stands for all of them."""
        scenario, nothing = self.scenario, [{} for _ in range(self.scenario.layers)]
        tokens = rows(TokenSet(scenario.step_of_gates, 1))
        dense, micro_batch = HostTensor(tokens, torch.int32), scenario.method.micro_batch(scenario.batch)
        with self._for_all(scenario.method.steps):
            GateStep(self.pool, nothing, nothing, dense, micro_batch).run(tokens)

    @contextmanager
    def _for_all(self, times: int) -> Iterator[None]:
        """What is done inside stands for so many of its like, one after the other."""
        tally, self.runtime.tally = self.runtime.tally, Tally()
        begins = self.runtime.clock
        yield
        self.runtime.clock = begins + times * (self.runtime.clock - begins)
        self.runtime.tally = tally.plus(self.runtime.tally, times)

    def _assemble(self) -> None:
        """Embedding and head become parts too, and all parts are written anew as shards, on one disk."""
        scenario = self.scenario
        outer, rates = scenario.outer_bytes, scenario.rates
        tally = Tally(read=outer, written=scenario.bytes_after + 2 * outer)
        self.stages.append(tally.plan("assemble", outer / scenario.clock.reading + tally.written / rates.write))


def rows(texts: TokenSet) -> np.ndarray:
    """What stands for a calibration set: a row a sample."""
    return np.zeros((texts.samples, 2), np.int32)


def plan_stages(scenario: Scenario) -> list[StagePlan]:
    """Every stage of a run, and what it takes."""
    return SimulatedRun(scenario).run()
