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
from distprune.decoder_layer import LayerShape, state_of
from distprune.distillation.layerwise import CURVE_POINTS, DistillationReport, averaged, shuffled_batches, split, warmup_and_cosine
from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.scheduler.pool import Later, WorkerPool
from distprune.engine.telemetry.progress import Progress
from distprune.engine.scheduler.relay import Order, Relay
from distprune.engine.stages.pruning_pass import DistilledSink, LayerSource
from distprune.engine.worker.host_tensor import HostTensor, pack_all, unpack, unpack_all
from distprune.engine.worker.actor import Finished

#: Journal entries of what all layers have learnt after a number of steps; and how many steps a crash may cost.
LEARNT = "learnt"
KEPT_EVERY = 10

#: What each layer has learnt so far.
Class = list[dict[str, HostTensor]]


class Step(Relay):
    """One step, or without a learning rate only a look at how far the predictions differ.

    Args:
        pupils: for every layer the arguments that open it with what it has learnt.
        micro_batch: samples that are never parted.
        rate: of learning.
    """

    def __init__(self, pool: WorkerPool, pupils: Sequence[tuple], micro_batch: int, rate: float | None = None):
        layers = len(pupils)
        self.end = 2 * layers
        super().__init__(pool, self.end + 1 + (layers if rate is not None else 0), micro_batch)
        self.layers, self.rate, self._pupils = layers, rate, pupils
        self._inputs: dict[int, list[Any]] = {}  # of each station on the way to the end
        self.learnt: dict[int, dict[str, HostTensor]] = {}

    def run(self, tokens: np.ndarray) -> list[float]:
        """Take the step with samples of token ids, (samples, length). Returns each sample's divergence in nats."""
        self.pool.submit(partial(self.begin, 0), "embed", self.pool.put(tokens))
        self.carry_through()
        return unpack(self._divergences).tolist()

    def _layer(self, station: int) -> int:
        return station % self.layers if station < self.end else self.end + self.layers - station

    def opening(self, station: int) -> Order:
        if station == self.end:
            return "open_end", ()
        index = self._layer(station)
        return ("open_dense", (index,)) if station < self.layers else ("open_pupil", self._pupils[index])

    def handing(self, station: int, number: int, samples: slice, piece: Any) -> Order:
        index = self._layer(station)
        if station > self.end:
            return "learn", (index, number, self._input_of_pupil(index, number), piece)
        self._inputs.setdefault(station, []).append(piece)
        if station == self.end:
            # What came out of the dense model went to the pruned one's first station.
            return "diverge", (piece, self._inputs[self.layers][number])
        return "listen", (index, number, piece if station < self.layers else self._input_of_pupil(index, number))

    def _input_of_pupil(self, index: int, number: int) -> Any:
        """The pruned model begins where the dense one began."""
        return self._inputs[self.layers + index if index else 0][number]

    def closing(self, station: int, pieces: int) -> Order:
        index = self._layer(station)
        if station == self.end:
            return "divergences", ()
        return ("leave", (index, pieces)) if station < self.end else ("step", (index, pieces, self.rate))

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        """What a step hands on dies with it."""

    def closed(self, station: int, *results: Any) -> None:
        if station == self.end:
            [self._divergences] = results
        elif station > self.end:
            [self.learnt[self._layer(station)]] = results


class EndToEnd:
    """The whole stage: steps over all samples but some, which tell whether anything was learnt.

    Args:
        tokens: of the calibration set that is learnt from, (samples, length).
        shapes: of the pruned layers.
        options: epochs, learning rate and the like.
        micro_batch: samples that are never parted.
        source: gives a pruned layer.
        sink: gets each layer when it has learnt.
    """

    def __init__(
        self,
        pool: WorkerPool,
        tokens: np.ndarray,
        shapes: Sequence[LayerShape],
        options: DistillConfig,
        micro_batch: int,
        source: LayerSource,
        sink: DistilledSink,
        journal: Journal,
        progress: Progress,
    ):
        self.pool, self.tokens, self.shapes, self.options = pool, tokens, shapes, options
        self.micro_batch, self.source, self.sink = micro_batch, source, sink
        self.journal, self.progress = journal, progress

    def run(self, done: Collection[int]) -> None:
        """Go on where the journal ends. Layers that are ``done`` have learnt all that they will."""
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
        lesson = DistillationReport(averaged(told["training"], CURVE_POINTS), told["before"], told["after"], kept)
        self._graduate(sorted(set(range(len(self.shapes))) - set(done)), lesson)

    # ---------------------------------------------------------------- steps

    def _learn(self, samples: np.ndarray, rate: float) -> float:
        step = self._step(rate)
        divergences = step.run(self.tokens[samples])
        self.learnt = [step.learnt[index] for index in range(len(self.shapes))]
        return self._a_token(divergences)

    def _divergence(self, samples: torch.Tensor) -> float:
        """Of the samples, in nats a token."""
        batches = samples.split(self.options.batch)
        return self._a_token([d for batch in batches for d in self._step().run(self.tokens[batch.numpy()])])

    def _a_token(self, divergences: Sequence[float]) -> float:
        return fsum(divergences) / (len(divergences) * self.tokens.shape[1])

    def _step(self, rate: float | None = None) -> Step:
        learnt = [self.pool.put(one) for one in self.learnt]
        pupils = [self._pupil(index, of_layer) for index, of_layer in enumerate(learnt)]
        return Step(self.pool, pupils, self.options.micro_batch(self.micro_batch), rate)

    def _pupil(self, index: int, learnt: Any) -> tuple:
        """A pruned layer, which is read when its turn comes, and what it has learnt."""
        return index, self.shapes[index], Later(lambda: pack_all(state_of(self.source(index)))), learnt

    # ---------------------------------------------------------------- the journal

    def _kept(self, steps: int) -> tuple[int, Class, dict[str, Any] | None]:
        """The last step that was kept, what had been learnt by then, and what there was to tell."""
        for step in range(steps, 0, -1):
            if self.journal.has(entry := entry_of(LEARNT, step)):
                learnt: Class = [{} for _ in self.shapes]
                for name, value in pack_all(self.journal.tensors(entry)).items():
                    index, _, parameter = name.partition("/")
                    learnt[int(index)][parameter] = value
                return step, learnt, self.journal.report(entry)
        return 0, [{} for _ in self.shapes], None

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

    def _graduate(self, layers: Sequence[int], lesson: DistillationReport) -> None:
        def receive(index: int, finished: Finished) -> None:
            self.sink(index, finished, lesson)

        for index in layers:
            learnt = self.learnt[index] if lesson.kept else {}
            self.pool.submit(partial(receive, index), "graduate", *self._pupil(index, learnt))
        self.pool.run()
