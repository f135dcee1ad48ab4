"""The stages of a run that the workers carry out, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import ray
from ray import ObjectRef

from distprune.decoder_layer import DecoderLayer, LayerShape, layer_from_state
from distprune.engine.pool import WorkerPool
from distprune.engine.progress import Progress
from distprune.engine.transport import Parcel, unpack_all
from distprune.methods import Profile

#: Called with each pruned layer as soon as it is back: index, layer, seconds by step.
LayerSink = Callable[[int, DecoderLayer, dict[str, float]], None]


def check_weights(pool: WorkerPool, layers: int, progress: Progress) -> None:
    """Read every weight once and see that it is a finite number, all workers at once.

    Raises:
        InputError: names the first bad tensor found and its file.
    """
    progress.stage("Checking weights", layers + 1)

    def receive(_: None) -> None:
        progress.advance()

    pool.submit(receive, "check_outer")
    for index in range(layers):
        pool.submit(receive, "check_layer", index)
    pool.run()


def write_own_samples(pool: WorkerPool, progress: Progress) -> None:
    """Let the model write its own calibration set: the one step that needs it whole, on one worker."""
    progress.stage("Own samples", 1)

    def receive(_: None) -> None:
        progress.advance()

    pool.submit(receive, "write_own_samples")
    pool.run()


def sweep(
    pool: WorkerPool, layers: int, block_length: int, progress: Progress
) -> tuple[dict[int, ObjectRef], list[dict[str, Parcel]]]:
    """The dense pass: hidden states handed from layer to layer, and what the method remembers of each.

    Returns:
        The hidden states at the input of every block, by the block's first layer, in the object store of the driver's
        node, which spills them to disk where they are many; and the profiles of all layers.
    """
    progress.stage("Dense pass", layers)
    boundaries: dict[int, ObjectRef] = {}
    profiles: list[dict[str, Parcel]] = []

    def submit(index: int, hidden_states: Parcel) -> None:
        stored = ray.put(hidden_states)
        if index % block_length == 0:
            boundaries[index] = stored
        pool.submit(partial(receive, index), "sweep", index, stored)

    def receive(index: int, hidden_states: Parcel, profile: dict[str, Parcel]) -> None:
        if index + 1 < layers:
            submit(index + 1, hidden_states)
        profiles.append(profile)
        progress.advance()

    pool.submit(partial(submit, 0), "embed")
    pool.run()
    return boundaries, profiles


def prune_blocks(
    pool: WorkerPool,
    boundaries: dict[int, ObjectRef],
    plan: Sequence[LayerShape],
    profiles: Sequence[Profile],
    sink: LayerSink,
    progress: Progress,
) -> None:
    """The pruning pass: blocks in parallel, and inside a block each layer on its pruned predecessors' output.

    A call is one layer, so a lost worker costs no more than that. Each pruned layer goes to ``sink`` before the next
    result is fetched: one at a time is held here, and no more than one a worker waits in the object store.
    """
    progress.stage("Pruning", len(plan))
    starts = set(boundaries)

    def ends_block(index: int) -> bool:
        return index + 1 == len(plan) or index + 1 in starts

    def submit(index: int, hidden_states: ObjectRef) -> None:
        arguments = index, hidden_states, plan[index], profiles[index], not ends_block(index)
        pool.submit(partial(receive, index), "prune", *arguments)

    def receive(index: int, tensors: dict[str, Parcel], output: Parcel | None, seconds: dict[str, float]) -> None:
        if not ends_block(index):
            submit(index + 1, ray.put(output))
        sink(index, layer_from_state(unpack_all(tensors), plan[index]), seconds)
        progress.advance()

    for index in sorted(starts):
        submit(index, boundaries.pop(index))
    pool.run()
