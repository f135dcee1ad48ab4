"""Gates learn on the workers: step after step forward through the gated layers, and back.

A step is a relay, as in end-to-end distillation. Its samples pass the gated layers, then the model's end, where the
gradient of their divergence from the dense model's predictions begins, which passes the layers from the last to the
first; each closes with the gradients in its gates. What the gates make of these is computed here, since all of them
share one constraint.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Sequence
from functools import partial
from itertools import islice
from math import fsum
from typing import Any

import numpy as np
import torch

from distprune.budgets import Target
from distprune.engine.run.journal import entry_of
from distprune.engine.run.states import DENSE, load_states
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.scheduler.relay import Relay
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.end_to_end_tasks import CloseEnd, Diverge, OpenEnd
from distprune.engine.worker.gate_tasks import CloseGated, OpenGated, OpenGatedBackward
from distprune.engine.worker.host_tensor import HostTensor, pack_all, unpack, unpack_all
from distprune.engine.worker.pass_tasks import Backward, CloseLayer, Embed, Sweep
from distprune.engine.worker.task import Later, Task
from distprune.gates import Gates
from distprune.methods import Profile
from distprune.methods.gated import GatedMethod

#: Journal entries of what gates have learnt after a number of steps; and how many steps a crash may cost.
GATES = "gates"
KEPT_EVERY = 10


class GateStep(Relay):
    """One step's way through the model.

    Args:
        profiles: what the dense pass left of every layer.
        gates: the values of every layer's gates.
        dense: the dense model's hidden states at its end, (samples, length, d), of the step's samples.
        micro_batch: samples that are never parted.
    """

    def __init__(
        self,
        pool: WorkerPool,
        profiles: Sequence[Profile],
        gates: Sequence[Gates],
        dense: HostTensor,
        micro_batch: int,
    ):
        self.end = len(gates)
        super().__init__(pool, 2 * self.end + 1, micro_batch)
        self._profiles, self._dense = profiles, dense
        self._names, self._gates = [one.keys() for one in gates], [pool.put(pack_all(one)) for one in gates]
        self._inputs: dict[int, list[Any]] = {}  # of each layer
        self._gradients: dict[int, Gates] = {}

    def run(self, tokens: np.ndarray) -> tuple[list[Gates], list[float]]:
        """Take samples of token ids, (samples, length), there and back.

        Returns:
            The gradient in every layer's gates, summed over the tokens; and each sample's divergence in nats.
        """
        self.pool.submit(Embed(self.pool.put(HostTensor(tokens, torch.int32))), partial(self.begin, 0))
        self.carry_through()
        return [self._gradients[index] for index in range(self.end)], unpack(self._divergences).tolist()

    def _layer(self, station: int) -> int:
        return station if station < self.end else 2 * self.end - station

    def opening(self, station: int) -> Task:
        if station == self.end:
            return OpenEnd()
        index, kind = self._layer(station), OpenGated if station < self.end else OpenGatedBackward
        return kind(index, Later(partial(self._besides_gates, index)), self._gates[index])

    def _besides_gates(self, index: int) -> Any:
        """What a layer's profile holds but gates, which is read when its turn comes."""
        profile, names = self._profiles[index], self._names[index]
        return pack_all({name: profile[name] for name in profile if name not in names})

    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        index = self._layer(station)
        if station == self.end:
            return Diverge(piece, self.pool.put(HostTensor(self._dense.array[samples], self._dense.dtype)))
        if station > self.end:
            return Backward(index, number, self._inputs[index][number], piece)
        self._inputs.setdefault(index, []).append(piece)
        return Sweep(index, number, piece)

    def closing(self, station: int, pieces: int) -> Task:
        if station == self.end:
            return CloseEnd()
        return (CloseLayer if station < self.end else CloseGated)(self._layer(station), pieces)

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        """What a step hands on dies with it."""

    def closed(self, station: int, *results: Any) -> None:
        if station == self.end:
            [self._divergences] = results
        elif station > self.end:
            [gradients] = results
            self._gradients[self._layer(station)] = unpack_all(gradients)


class GateLearning:
    """The whole stage, after a dense pass that has kept the hidden states at the model's end.

    Args:
        method: whose gates learn.
        target: what is to stay of the model.
        tokens: of the calibration set, (samples, length).
        profiles: what the dense pass left of every layer, the gates as they begin among it.
    """

    def __init__(
        self,
        context: RunContext,
        method: GatedMethod,
        target: Target,
        tokens: np.ndarray,
        profiles: Sequence[Profile],
    ):
        self.context, self.pool, self.method, self.tokens = context, context.pool, method, tokens
        self.journal, self.profiles = context.journal, profiles
        self.learner = method.learner(target, profiles)

    def run(self) -> list[Profile]:
        """Resume where the journal ends. Returns the profiles with what the gates have learnt."""
        steps = self.method.steps
        self._take_up()
        if self.learner.steps < steps:
            self._dense = load_states(self.journal, DENSE, self.context.layers)
        self.context.progress.stage("Learning gates", steps, self.learner.steps)
        for samples in islice(self.method.batches(len(self.tokens)), self.learner.steps, None):
            divergence = self._learn(samples.numpy())
            if self.learner.steps % KEPT_EVERY == 0 or self.learner.steps == steps:
                self._keep(divergence)
            self.context.progress.advance()
        self._tell()
        if not self.context.keeps_dense(self.context.layers):
            self.journal.remove(entry_of(DENSE, self.context.layers))
        return [ChainMap(gates, profile) for gates, profile in zip(self.learner.log_alpha, self.profiles, strict=True)]

    def _learn(self, samples: np.ndarray) -> float:
        """Take a step. Returns the divergence in nats a token."""
        step = GateStep(
            self.pool,
            self.profiles,
            self.learner.gates(),
            HostTensor(self._dense.array[samples], self._dense.dtype),
            self.method.micro_batch(self.context.micro_batch),
        )
        gradients, divergences = step.run(self.tokens[samples])
        self.learner.learn(gradients, tokens=samples.size * self.tokens.shape[1])
        return fsum(divergences) / (samples.size * self.tokens.shape[1])

    # ---------------------------------------------------------------- the journal

    def _take_up(self) -> None:
        for step in range(self.method.steps, 0, -1):
            if self.journal.has(entry := entry_of(GATES, step)):
                self.learner.take_up(self.journal.tensors(entry))
                return

    def _keep(self, divergence: float) -> None:
        step = self.learner.steps
        self.journal.write(entry_of(GATES, step), divergence, self.learner.state())
        self.journal.remove(entry_of(GATES, (step - 1) // KEPT_EVERY * KEPT_EVERY))

    def _tell(self) -> None:
        divergence = self.journal.report(entry_of(GATES, self.method.steps))
        self.context.progress.note(
            f"After {self.method.steps} steps the gates are expected to keep {self.learner.size:.1%} of the decoder "
            f"layers; with those that the last step drew, predictions diverge by {divergence:.3g} nats a token"
        )
