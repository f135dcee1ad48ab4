"""The dense pass: hidden states passed from layer to layer, and what the method remembers of each.

Where a gradient pass follows, there are no profiles yet, and the hidden states at every layer wait for it. Moments that
are carried to pruning are collected here either way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from distprune.engine.run.journal import entry_of
from distprune.engine.run.states import DENSE, MOMENTS, load_states, save_states
from distprune.engine.scheduler.relay import Relay
from distprune.engine.stages.chunked_passes import ChunkedForward
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.host_tensor import HostTensor, unpack_all
from distprune.engine.worker.pass_tasks import CloseLayer, Embed, OpenForward, Sweep
from distprune.engine.worker.task import Task
from distprune.methods import Profile

#: The hidden states of every so many layers are kept: a disk takes longer to write those of all than a GPU to make
#: them. Whoever resumes the pass makes those of the layers in between again.
KEPT_EVERY = 4
#: Journal entries of what the method remembers of a layer, and of layers that were passed without a profile.
PROFILE, PASSED = "profile", "passed"


class DensePass(Relay):
    """The dense pass of one run.

    Args:
        tokens: of the calibration set, (samples, length).
        for_gradients: whether a gradient pass follows.
        keeps_end: whether the hidden states at the model's end are kept; those for a gradient pass are.
    """

    def __init__(self, context: RunContext, tokens: np.ndarray, for_gradients: bool = False, keeps_end: bool = False):
        keeps_end = keeps_end or for_gradients
        super().__init__(context.pool, context.layers, context.micro_batch, keeps_end, context.in_one_piece)
        self.context, self.tokens, self.for_gradients = context, tokens, for_gradients
        self.layers, self.journal, self.progress = context.layers, context.journal, context.progress
        self._kind, self._states = PASSED if for_gradients else PROFILE, DENSE

    def run(self) -> list[Profile]:
        """Resume where the journal ends. Returns the profiles of all layers, which are empty if gradients follow."""
        entries = [entry_of(self._kind, index) for index in range(self.layers)]
        done = self.journal.count_first(entries)
        if 0 < done < self.layers:
            done = next(index for index in range(done, -1, -1) if self.journal.has(entry_of(self._states, index)))
        self.progress.stage("Dense pass", self.layers, done)
        if done == 0:
            self._begin()
        elif done < self.layers:
            self.begin(done, load_states(self.journal, self._states, done))
        self.carry_through()
        return [self.journal.stored_tensors(entry) for entry in entries]

    def _begin(self) -> None:
        self.pool.submit(Embed(self.pool.put(HostTensor(self.tokens, torch.int32))), self._embedded)

    def _embedded(self, hidden_states: HostTensor) -> None:
        save_states(self.journal, DENSE, 0, [hidden_states])
        self.begin(0, hidden_states)

    def opening(self, station: int) -> Task:
        return OpenForward(station)

    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        return Sweep(station, number, piece)

    def closing(self, station: int, pieces: int) -> Task:
        return CloseLayer(station, pieces)

    def is_shared(self, station: int) -> bool:
        return station in self.context.mixtures_in_chunks

    def share(self, station: int, piece: Any, pass_on: Callable[..., None], close: Callable[..., None]) -> None:
        chunks, profiles = self.context.dense_chunks(station), not self.for_gradients
        ChunkedForward(self.pool, station, chunks, profiles, piece, pass_on, close).submit()

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        is_end = station == self.layers
        if self.for_gradients or is_end or self.context.keeps_dense(station) or station % KEPT_EVERY == 0:
            save_states(self.journal, self._states, station, pieces)
        if is_end:  # the last layer is not yet closed
            return
        passed = station - KEPT_EVERY
        if station % KEPT_EVERY == 0 and not (self.for_gradients or self.context.keeps_dense(passed)):
            self.journal.remove(entry_of(DENSE, passed))

    def closed(self, station: int, profile: dict[str, HostTensor], carried: dict[str, HostTensor]) -> None:
        if carried:
            self.journal.write(entry_of(MOMENTS, station), tensors=unpack_all(carried))
        self.journal.write(entry_of(self._kind, station), tensors=unpack_all(profile))  # last: now the layer is done
        self.progress.advance()
