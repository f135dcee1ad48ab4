"""The dense pass: hidden states handed from layer to layer, and what the method remembers of each.

Where a gradient pass follows, there are no profiles yet, and the hidden states at every layer wait for it. Moments that
are carried to pruning are collected here either way.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.telemetry.progress import Progress
from distprune.engine.scheduler.relay import Order, Relay
from distprune.engine.run.states import DENSE, MOMENTS, load_states, save_states
from distprune.engine.worker.host_tensor import HostTensor, unpack_all
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
        layers: of the model.
        block_length: of the hidden states at the input of every block this long, the journal keeps those that pruning
            needs.
        micro_batch: samples that are never parted.
        for_gradients: whether a gradient pass follows.
    """

    def __init__(
        self,
        pool: WorkerPool,
        tokens: np.ndarray,
        layers: int,
        block_length: int,
        micro_batch: int,
        journal: Journal,
        progress: Progress,
        for_gradients: bool = False,
    ):
        super().__init__(pool, layers, micro_batch, keeps_end=for_gradients)
        self.tokens, self.layers, self.block_length = tokens, layers, block_length
        self.journal, self.progress, self.for_gradients = journal, progress, for_gradients
        self._kind = PASSED if for_gradients else PROFILE

    def run(self) -> list[Profile]:
        """Resume where the journal ends. Returns the profiles of all layers, which are empty if gradients follow."""
        entries = [entry_of(self._kind, index) for index in range(self.layers)]
        done = self.journal.count_first(entries)
        if 0 < done < self.layers:
            done = next(index for index in range(done, -1, -1) if self.journal.has(entry_of(DENSE, index)))
        self.progress.stage("Dense pass", self.layers, done)
        if done == 0:
            self.pool.submit(self._embedded, "embed", self.pool.put(self.tokens))
        elif done < self.layers:
            self.begin(done, load_states(self.journal, DENSE, done))
        self.carry_through()
        return [self.journal.stored_tensors(entry) for entry in entries]

    def _embedded(self, hidden_states: HostTensor) -> None:
        save_states(self.journal, DENSE, 0, [hidden_states])
        self.begin(0, hidden_states)

    def opening(self, station: int) -> Order:
        return "open_layer", (station,)

    def handing(self, station: int, number: int, samples: slice, piece: Any) -> Order:
        return "sweep", (station, number, piece)

    def closing(self, station: int, pieces: int) -> Order:
        return "profile", (station, pieces)

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        if self.for_gradients or self._begins_block(station) or station % KEPT_EVERY == 0:
            save_states(self.journal, DENSE, station, pieces)
        passed = station - KEPT_EVERY
        if station % KEPT_EVERY == 0 and not (self.for_gradients or self._begins_block(passed)):
            self.journal.remove(entry_of(DENSE, passed))

    def _begins_block(self, station: int) -> bool:
        """Whether pruning needs the hidden states at its input."""
        return station % self.block_length == 0

    def closed(self, station: int, profile: dict[str, HostTensor], carried: dict[str, HostTensor]) -> None:
        if carried:
            self.journal.write(entry_of(MOMENTS, station), tensors=unpack_all(carried))
        self.journal.write(entry_of(self._kind, station), tensors=unpack_all(profile))  # last: now the layer is done
        self.progress.advance()
