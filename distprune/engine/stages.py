"""The stages of a run that the workers carry out, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ray import ObjectRef

from distprune.decoder_layer import DecoderLayer, LayerShape, layer_from_state
from distprune.engine.pool import WorkerPool, fetch
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
    pool.submit("outer", "check_outer")
    for index in range(layers):
        pool.submit(index, "check_layer", index)
    for _, (result,) in pool.completed():
        fetch(result)
        progress.advance()


def sweep(
    pool: WorkerPool, layers: int, block_length: int, progress: Progress
) -> tuple[dict[int, ObjectRef], list[dict[str, Parcel]]]:
    """The dense pass: hidden states handed from layer to layer, and what the method remembers of each.

    Returns:
        The hidden states at the input of every block, by the block's first layer, in the object store; and the
        profiles of all layers.
    """
    progress.stage("Dense pass", layers)
    boundaries: dict[int, ObjectRef] = {}
    profiles: list[dict[str, Parcel]] = []
    pool.submit("embedding", "embed")
    for key, (hidden_states, *profile) in pool.completed():
        index = 0 if key == "embedding" else key + 1
        if profile:
            profiles.append(fetch(profile[0]))
            progress.advance()
        if index == layers:
            break
        if index % block_length == 0:
            boundaries[index] = hidden_states
        pool.submit(index, "sweep", index, hidden_states)
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

    A task is one layer, so a lost worker costs no more than that. Each pruned layer goes to ``sink`` before the next
    result is fetched: no more than one is held here, and no more than one a worker waits in the object store.
    """
    progress.stage("Pruning", len(plan))
    starts = set(boundaries)

    def submit(index: int, hidden_states: ObjectRef) -> None:
        propagate = index + 1 < len(plan) and index + 1 not in starts
        pool.submit(index, "prune", index, hidden_states, plan[index], profiles[index], propagate)

    for index in sorted(starts):
        submit(index, boundaries.pop(index))
    for index, (tensors, output, seconds) in pool.completed():
        layer = layer_from_state(unpack_all(fetch(tensors)), plan[index])
        if index + 1 < len(plan) and index + 1 not in starts:
            submit(index + 1, output)
        sink(index, layer, fetch(seconds))
        progress.advance()
