"""The stages of a run that the workers carry out, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import ray
from ray import ObjectRef

from distprune.decoder_layer import DecoderLayer, LayerShape, layer_from_state, state_of
from distprune.distillation import Lesson
from distprune.engine.pool import WorkerPool
from distprune.engine.progress import Progress
from distprune.engine.tasks import Report
from distprune.engine.transport import Parcel, pack_all, unpack_all
from distprune.methods import Profile

#: Called with each pruned layer as soon as it is back: index, layer, and what its task tells.
PrunedSink = Callable[[int, DecoderLayer, Report], None]
#: Gives a pruned layer back.
LayerSource = Callable[[int], DecoderLayer]
#: Called with each distilled layer as soon as it is back: index, layer, and how its distillation went.
DistilledSink = Callable[[int, DecoderLayer, Lesson], None]


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
    sink: PrunedSink,
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

    def receive(index: int, tensors: dict[str, Parcel], output: Parcel | None, report: Report) -> None:
        if not ends_block(index):
            submit(index + 1, ray.put(output))
        sink(index, layer_from_state(unpack_all(tensors), plan[index]), report)
        progress.advance()

    for index in sorted(starts):
        submit(index, boundaries.pop(index))
    pool.run()


def distill_layers(
    pool: WorkerPool,
    layers: int,
    calibration: Path | None,
    ahead: int,
    source: LayerSource,
    sink: DistilledSink,
    progress: Progress,
) -> None:
    """Every pruned layer learns from the dense layer's hidden states, all at once.

    The dense model runs over the distillation's calibration set, no more than ``ahead`` layers before those that have
    learnt, so that the hidden states of few layers exist at a time.
    """
    progress.stage("Distilling", layers)
    learning: set[int] = set()
    waiting: list[tuple[int, ObjectRef]] = []

    def enter(index: int, stored: ObjectRef) -> None:
        """The dense hidden states at the input of layer ``index`` are there."""
        if len(learning) < ahead:
            learning.add(index)
            pool.submit(partial(leave, index, stored), "advance", index, stored)
        else:
            waiting.append((index, stored))

    def leave(index: int, inputs: ObjectRef, targets: Parcel) -> None:
        stored, layer = ray.put(targets), source(index)
        arguments = index, layer.shape, pack_all(state_of(layer)), inputs, stored
        pool.submit(partial(receive, index, layer.shape), "distill", *arguments)
        if index + 1 < layers:
            enter(index + 1, stored)

    def receive(index: int, shape: LayerShape, tensors: dict[str, Parcel], lesson: Lesson) -> None:
        sink(index, layer_from_state(unpack_all(tensors), shape), lesson)
        learning.discard(index)
        if waiting:
            enter(*waiting.pop())
        progress.advance()

    pool.submit(lambda embedded: enter(0, ray.put(embedded)), "embed", calibration)
    pool.run()
