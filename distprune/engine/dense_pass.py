"""The dense pass: hidden states handed from layer to layer, and what the method remembers of each.

A pipeline: each worker reads one layer ahead of time, gets the samples in pieces, each as soon as the layer before has
passed it on, and ends with the layer's profile, when the next layers have long been at work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from distprune.engine.journal import Journal, entry_of
from distprune.engine.pool import Call, WorkerPool
from distprune.engine.progress import Progress
from distprune.engine.states import CARRIED, DENSE, load_states, save_states
from distprune.engine.transport import Parcel, unpack_all
from distprune.methods import Profile

#: Journal entries of what the method remembers of a layer.
PROFILE = "profile"
# Pieces for every worker: the more, the sooner all of them are at work, and the more calls.
PIECES_PER_WORKER = 4


@dataclass
class OpenLayer:
    """A layer between its reading and its profile, and the pieces of its input so far."""

    call: Call
    fed: list[Any] = field(default_factory=list)


class DensePass:
    """The dense pass of one run.

    Args:
        tokens: of the calibration set, (samples, length).
        layers: of the model.
        block_length: of the hidden states at the input of every block this long, the journal keeps those that pruning
            needs.
        micro_batch: samples that are never parted.
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
    ):
        self.pool, self.tokens, self.journal, self.progress = pool, tokens, journal, progress
        self.layers, self.block_length, self.micro_batch = layers, block_length, micro_batch
        self._open: dict[int, OpenLayer] = {}

    def run(self) -> list[Profile]:
        """Go on where the journal ends. Returns the profiles of all layers."""
        entries = [entry_of(PROFILE, index) for index in range(self.layers)]
        done = next((index for index, entry in enumerate(entries) if not self.journal.has(entry)), self.layers)
        self.progress.stage("Dense pass", self.layers, done)
        if done == 0:
            self.pool.submit(self._embedded, "embed", self.pool.put(self.tokens))
        elif done < self.layers:
            self._begin(done, load_states(self.journal, DENSE, done))
        self.pool.run()
        return [self.journal.tensors(entry) for entry in entries]

    def _embedded(self, hidden_states: Parcel) -> None:
        save_states(self.journal, DENSE, 0, [hidden_states])
        self._begin(0, hidden_states)

    def _begin(self, first: int, hidden_states: Parcel) -> None:
        """Give a layer all of its input at once, in the pieces that the layers after it will get."""
        workers = len(self.pool.workers)
        pieces = split(len(hidden_states.array), self.micro_batch, PIECES_PER_WORKER * workers if workers > 1 else 1)
        self._pieces, self._next = len(pieces), first
        self._open_until(first + workers)
        for samples in pieces:
            self._feed(first, Parcel(hidden_states.array[samples], hidden_states.dtype))

    def _open_until(self, end: int) -> None:
        """Let workers read the layers before ``end`` and wait for their input."""
        for index in range(self._next, min(end, self.layers)):
            self._open[index] = OpenLayer(self.pool.submit_steps(1 + self._pieces + 1))
            self.pool.add_step(self._open[index].call, lambda _: None, "open_layer", index)
            self._next = index + 1

    def _feed(self, index: int, piece: Parcel) -> None:
        self._open_until(index + 1)
        layer, put = self._open[index], self.pool.put(piece)
        self.pool.add_step(layer.call, partial(self._pass_on, index), "sweep", index, len(layer.fed), put)
        layer.fed.append(put)
        if len(layer.fed) == self._pieces:
            self.pool.add_step(layer.call, partial(self._keep, index), "profile", index, self._pieces)

    def _pass_on(self, index: int, output: Parcel) -> None:
        if index + 1 == self.layers:
            return
        self._feed(index + 1, output)
        given = self._open[index + 1].fed
        if len(given) == self._pieces:
            save_states(self.journal, DENSE, index + 1, self.pool.get(given))

    def _keep(self, index: int, profile: dict[str, Parcel], carried: dict[str, Parcel]) -> None:
        del self._open[index]
        self._open_until(index + 1 + len(self.pool.workers))
        if carried:
            self.journal.write(entry_of(CARRIED, index), tensors=unpack_all(carried))
        self.journal.write(entry_of(PROFILE, index), tensors=unpack_all(profile))  # last: with it the layer is done
        if index % self.block_length:
            self.journal.remove(entry_of(DENSE, index))
        self.progress.advance()


def split(samples: int, micro_batch: int, most: int) -> list[slice]:
    """At most ``most`` runs of samples, as even as whole micro-batches allow."""
    batches = -(-samples // micro_batch)
    count = min(batches, most)
    starts = [micro_batch * (batches * number // count) for number in range(count)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], samples], strict=True)]
