"""End-to-end distillation on the workers: step after step through the dense model, the pruned one, and back.

A step is a relay. Its samples pass the dense model's layers, then from the embedding the pruned model's, then the
model's end, where the gradient begins, which passes the pruned layers from the last to the first; each closes by
learning. So no worker holds more than one layer, and a lost one costs one layer's part of a step.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from math import fsum
from typing import Any

import numpy as np
import torch

from distprune.config import DistillConfig
from distprune.distillation.layerwise import (
    CURVE_POINTS,
    DistillationReport,
    averaged,
    shuffled_batches,
    split,
    warmup_and_cosine,
)
from distprune.engine.run.journal import entry_of
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.relay import Relay
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.layerwise_distillation import DistilledSink, LayerSource
from distprune.engine.worker.end_to_end_tasks import (
    CloseEnd,
    Diverge,
    FoldIn,
    Forward,
    Learn,
    Leave,
    OpenDense,
    OpenEnd,
    OpenStudent,
    StepOptimizer,
)
from distprune.engine.worker.host_tensor import HostTensor, pack_all, unpack, unpack_all
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.pass_tasks import Embed
from distprune.engine.worker.task import Later, Task

#: Journal entries of what all layers have learnt after a number of steps; and how many steps a crash may cost.
LEARNT = "learnt"
KEPT_EVERY = 10

#: What each layer has learnt so far.
Learnt = list[dict[str, HostTensor]]


class Step(Relay):
    """One step, or without a learning rate only a look at how far the predictions differ.

    Args:
        students: for every layer the task that opens it with what it has learnt.
        micro_batch: samples that are never parted.
        rate: of learning.
    """

    def __init__(self, pool: WorkerPool, students: Sequence[OpenStudent], micro_batch: int, rate: float | None = None):
        layers = len(students)
        self.end = 2 * layers
        super().__init__(pool, self.end + 1 + (layers if rate is not None else 0), micro_batch)
        self.layers, self.rate, self._students = layers, rate, students
        self._inputs: dict[int, list[Any]] = {}  # of each station on the way to the end
        self.learnt: dict[int, dict[str, HostTensor]] = {}

    def run(self, tokens: np.ndarray) -> list[float]:
        """Take the step with samples of token ids, (samples, length). Returns each sample's divergence in nats."""
        self.pool.submit(Embed(self.pool.put(HostTensor(tokens, torch.int32))), partial(self.begin, 0))
        self.carry_through()
        return unpack(self._divergences).tolist()

    def _layer(self, station: int) -> int:
        return station % self.layers if station < self.end else self.end + self.layers - station

    def opening(self, station: int) -> Task:
        if station == self.end:
            return OpenEnd()
        index = self._layer(station)
        return OpenDense(index) if station < self.layers else self._students[index]

    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        index = self._layer(station)
        if station > self.end:
            return Learn(index, number, self._input_of_student(index, number), piece)
        self._inputs.setdefault(station, []).append(piece)
        if station == self.end:
            # What came out of the dense model went to the pruned one's first station.
            return Diverge(piece, self._inputs[self.layers][number])
        return Forward(index, number, piece if station < self.layers else self._input_of_student(index, number))

    def _input_of_student(self, index: int, number: int) -> Any:
        """The pruned model begins where the dense one began."""
        return self._inputs[self.layers + index if index else 0][number]

    def closing(self, station: int, pieces: int) -> Task:
        index = self._layer(station)
        if station == self.end:
            return CloseEnd()
        return Leave(index, pieces) if station < self.end else StepOptimizer(index, pieces, self.rate)

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        """What a step hands on dies with it."""

    def closed(self, station: int, *results: Any) -> None:
        if station == self.end:
            [self._divergences] = results
        elif station > self.end:
            [self.learnt[self._layer(station)]] = results


class EndToEndDistillation:
    """The whole stage: steps over all samples but some, which tell whether anything was learnt.

    Args:
        tokens: of the calibration set that is learnt from, (samples, length).
        options: epochs, learning rate and the like.
        source: gives a pruned layer.
        sink: gets each layer when it has learnt.
    """

    def __init__(
        self, context: RunContext, tokens: np.ndarray, options: DistillConfig, source: LayerSource, sink: DistilledSink
    ):
        self.context, self.pool, self.tokens, self.options = context, context.pool, tokens, options
        self.source, self.sink = source, sink
        self.journal, self.progress = context.journal, context.progress

    def run(self, done: Collection[int]) -> None:
        """Resume where the journal ends. Layers that are ``done`` have learnt all that they will."""
        training, held_out = split(len(self.tokens), self.options)
        batches = list(shuffled_batches(len(training), self.options))
        rate = warmup_and_cosine(len(batches))
        step, self.learnt, told = self._kept(len(batches))
        self.progress.stage("Distilling", len(batches), step)
        if told is None:
            told = {"before": self._divergence(held_out), "training": []}
        for number in range(step, len(batches)):
            samples = training[batches[number]].numpy()
            told["training"].append(self._learn(samples, rate(number) * self.options.learning_rate))
            if number + 1 == len(batches):
                told["after"] = self._divergence(held_out)
            if (number + 1) % KEPT_EVERY == 0 or number + 1 == len(batches):
                self._keep(number + 1, told)
            self.progress.advance()
        kept = told["after"] < told["before"]
        report = DistillationReport(averaged(told["training"], CURVE_POINTS), told["before"], told["after"], kept)
        self._fold_in(sorted(set(range(self.context.layers)) - set(done)), report)

    # ---------------------------------------------------------------- steps

    def _learn(self, samples: np.ndarray, rate: float) -> float:
        step = self._step(rate)
        divergences = step.run(self.tokens[samples])
        self.learnt = [step.learnt[index] for index in range(self.context.layers)]
        return self._a_token(divergences)

    def _divergence(self, samples: torch.Tensor) -> float:
        """Of the samples, in nats a token."""
        batches = samples.split(self.options.batch)
        return self._a_token([d for batch in batches for d in self._step().run(self.tokens[batch.numpy()])])

    def _a_token(self, divergences: Sequence[float]) -> float:
        return fsum(divergences) / (len(divergences) * self.tokens.shape[1])

    def _step(self, rate: float | None = None) -> Step:
        learnt = [self.pool.put(one) for one in self.learnt]
        students = [OpenStudent(index, self._layer(index), of_layer) for index, of_layer in enumerate(learnt)]
        return Step(self.pool, students, self.options.micro_batch(self.context.micro_batch), rate)

    def _layer(self, index: int) -> Later:
        """A pruned layer, which is read when its turn comes."""
        return Later(lambda: pack_all(self.source(index)))

    # ---------------------------------------------------------------- the journal

    def _kept(self, steps: int) -> tuple[int, Learnt, dict[str, Any] | None]:
        """The last step that was kept, what had been learnt by then, and what there was to tell."""
        for step in range(steps, 0, -1):
            if self.journal.has(entry := entry_of(LEARNT, step)):
                learnt: Learnt = [{} for _ in range(self.context.layers)]
                for name, value in pack_all(self.journal.tensors(entry)).items():
                    index, _, parameter = name.partition("/")
                    learnt[int(index)][parameter] = value
                return step, learnt, self.journal.report(entry)
        return 0, [{} for _ in range(self.context.layers)], None

    def _keep(self, step: int, told: dict[str, Any]) -> None:
        tensors = {
            f"{index}/{name}": tensor
            for index, one in enumerate(self.learnt)
            for name, tensor in unpack_all(one).items()
        }
        self.journal.write(entry_of(LEARNT, step), told, tensors)
        before = (step - 1) // KEPT_EVERY * KEPT_EVERY
        self.journal.remove(entry_of(LEARNT, before))

    # ---------------------------------------------------------------- the end

    def _fold_in(self, layers: Sequence[int], report: DistillationReport) -> None:
        def receive(index: int, finished: Finished) -> None:
            self.sink(index, finished, report)

        for index in layers:
            learnt = self.learnt[index] if report.kept else {}
            self.pool.submit(FoldIn(index, self._layer(index), learnt), partial(receive, index))
        self.pool.run()
