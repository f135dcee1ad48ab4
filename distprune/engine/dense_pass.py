"""The dense pass: hidden states handed from layer to layer, and what the method remembers of each.

A pipeline: each worker has one layer, and gets the samples in pieces, each as soon as the layer before has passed it
on. With one worker, or one piece, it is a relay.
"""

from __future__ import annotations

from functools import partial

from distprune.engine.journal import Journal, entry_of
from distprune.engine.pool import Call, WorkerPool
from distprune.engine.progress import Progress
from distprune.engine.states import DENSE, load_states, save_states
from distprune.engine.transport import Parcel, unpack_all
from distprune.methods import Profile

#: Journal entries of what the method remembers of a layer.
PROFILE = "profile"
# Pieces for every worker: the more, the sooner all of them have a layer, and the more calls.
PIECES_PER_WORKER = 4


class DensePass:
    """The dense pass of one run.

    Args:
        layers: of the model.
        block_length: of the hidden states at the input of every block this long, the journal keeps those that pruning
            needs.
        micro_batch: samples that are never parted.
    """

    def __init__(
        self, pool: WorkerPool, layers: int, block_length: int, micro_batch: int, journal: Journal, progress: Progress
    ):
        self.pool, self.journal, self.progress = pool, journal, progress
        self.layers, self.block_length, self.micro_batch = layers, block_length, micro_batch
        self._calls: dict[int, Call] = {}  # of the layers at work
        self._given: dict[int, list[Parcel]] = {}  # the pieces of their output so far

    def run(self) -> list[Profile]:
        """Go on where the journal ends. Returns the profiles of all layers."""
        done = self.journal.count(PROFILE)
        self.progress.stage("Dense pass", self.layers, done)
        if done == 0:
            self.pool.submit(self._begin, "embed")
        elif done < self.layers:
            self._feed_whole(done, load_states(self.journal, DENSE, done))
        self.pool.run()
        return [self.journal.tensors(entry_of(PROFILE, index)) for index in range(self.layers)]

    def _begin(self, embedded: Parcel) -> None:
        save_states(self.journal, DENSE, 0, [embedded])
        self._feed_whole(0, embedded)

    def _feed_whole(self, index: int, hidden_states: Parcel) -> None:
        """Give a layer all of its input at once, in the pieces that the layers after it will get."""
        workers = len(self.pool.workers)
        most = PIECES_PER_WORKER * workers if workers > 1 else 1
        pieces = split(len(hidden_states.array), self.micro_batch, most)
        self._pieces = len(pieces)
        for number, samples in enumerate(pieces):
            self._feed(index, number, Parcel(hidden_states.array[samples], hidden_states.dtype))

    def _feed(self, index: int, number: int, piece: Parcel) -> None:
        if number == 0:
            arguments = index, self._pieces
            self._calls[index] = self.pool.submit_pieces(
                partial(self._receive, index), self._pieces, "sweep", *arguments
            )
        self.pool.feed(self._calls[index], number, self.pool.put(piece))

    def _receive(self, index: int, output: Parcel, profile: dict[str, Parcel] | None) -> None:
        """A piece of a layer's output is there, and with the last one its profile."""
        given = self._given.setdefault(index, [])
        if index + 1 < self.layers:
            self._feed(index + 1, len(given), output)
            given.append(output)
        if profile is not None:
            self._keep(index, profile)

    def _keep(self, index: int, profile: dict[str, Parcel]) -> None:
        given = self._given.pop(index)
        if given:
            save_states(self.journal, DENSE, index + 1, given)
        self.journal.write(entry_of(PROFILE, index), tensors=unpack_all(profile))
        if index % self.block_length:
            self.journal.remove(entry_of(DENSE, index))
        del self._calls[index]
        self.progress.advance()


def split(samples: int, micro_batch: int, most: int) -> list[slice]:
    """At most ``most`` runs of samples, as even as whole micro-batches allow."""
    batches = -(-samples // micro_batch)
    count = min(batches, most)
    starts = [micro_batch * (batches * number // count) for number in range(count)]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], samples], strict=True)]
