"""The stages of a run that the workers carry out, layer by layer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from distprune.calibration import CalibrationMetadata, write_calibration
from distprune.checkpoint import WrittenFile
from distprune.config import DistillConfig
from distprune.decoder_layer import DecoderLayer, LayerShape, state_of
from distprune.distillation.layerwise import DistillationReport
from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.scheduler.pool import Later, WorkerPool
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.report import Report
from distprune.engine.run.states import DENSE, MOMENTS, PRUNED, load_states, save_states
from distprune.engine.worker.host_tensor import HostTensor, pack_all
from distprune.engine.worker.actor import Finished
from distprune.engine.run.write_behind import write_behind
from distprune.methods import Profile

#: Called with each pruned layer as soon as it is there: index, tensors or file, and what its task tells.
PrunedSink = Callable[[int, Finished, Report], None]
#: Gives a pruned layer back.
LayerSource = Callable[[int], DecoderLayer]
#: Called with each distilled layer as soon as it is there: index, tensors or file, and how its distillation went.
DistilledSink = Callable[[int, Finished, DistillationReport], None]


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


def write_own_samples(pool: WorkerPool, output: Path, progress: Progress) -> None:
    """Let the model write its own calibration set: the one step that needs it whole, on one worker."""
    progress.stage("Own samples", 1)

    def receive(tokens: np.ndarray, metadata: CalibrationMetadata) -> None:
        write_calibration(output, tokens, metadata)
        progress.advance()

    pool.submit(receive, "own_samples")
    pool.run()


def prune_blocks(
    pool: WorkerPool,
    plan: Sequence[LayerShape],
    profiles: Sequence[Profile],
    block_length: int,
    done: Collection[int],
    journal: Journal,
    sink: PrunedSink,
    progress: Progress,
) -> None:
    """The pruning pass: blocks in parallel, and inside a block each layer on its pruned predecessors' output.

    A call is one layer, so a lost worker costs no more than that. Pruned layers go to ``sink`` while the workers go on:
    two at a time are held here, at most. What waits in the journal is read when its layer's turn comes. Layers that are
    ``done`` are passed over.
    """
    progress.stage("Pruning", len(plan), len(done))

    def ends_block(index: int) -> bool:
        return index + 1 == len(plan) or (index + 1) % block_length == 0

    def submit(index: int, hidden_states: Any, carried: Any) -> None:
        profile = Later(lambda: pack_all(dict(profiles[index])))
        arguments = index, hidden_states, plan[index], profile, carried, not ends_block(index)
        pool.submit(partial(receive, index), "prune", *arguments)

    def stored_states(kind: str, index: int) -> Any:
        return pool.put(load_states(journal, kind, index))

    def stored_moments(index: int) -> Any:
        return pack_all(journal.tensors(entry_of(MOMENTS, index)))

    def receive(index: int, finished: Finished, output: HostTensor | None, report: Report) -> None:
        if not ends_block(index):
            submit(index + 1, pool.put(output), {})
        write(partial(keep, index, finished, output, report))

    def keep(index: int, finished: Finished, output: HostTensor | None, report: Report) -> None:
        if output is not None:
            save_states(journal, PRUNED, index + 1, [output])
        sink(index, finished, report)
        for kind in (DENSE, PRUNED, MOMENTS):
            journal.remove(entry_of(kind, index))
        progress.advance()

    for start in range(0, len(plan), block_length):
        block = range(start, min(start + block_length, len(plan)))
        index = next((index for index in block if index not in done), None)
        if index is not None:
            kind, carried = (DENSE, Later(partial(stored_moments, index))) if index == start else (PRUNED, {})
            submit(index, Later(partial(stored_states, kind, index)), carried)
    with write_behind() as write:
        pool.run()


def distill_layers(
    pool: WorkerPool,
    tokens: np.ndarray,
    layers: int,
    options: DistillConfig,
    most: int,
    done: Collection[int],
    source: LayerSource,
    sink: DistilledSink,
    progress: Progress,
) -> None:
    """Every pruned layer learns from the dense model's hidden states, all at once.

    The dense model runs over the distillation's calibration set as far as is needed for ``most`` layers to learn at a
    time, so that the hidden states of few layers exist at once. Layers that are ``done`` are passed over.
    """
    progress.stage("Distilling", layers, len(done))
    states: dict[int, Any] = {}  # the dense hidden states at the input of layers
    advancing: set[int] = set()
    learning: set[int] = set()
    waiting = sorted(set(range(layers)) - set(done))

    def arrive(index: int, hidden_states: HostTensor) -> None:
        """The dense hidden states at the input of layer ``index``, or at the model's end, are there."""
        states[index] = pool.put(hidden_states)
        go_on()

    def go_on() -> None:
        """Let the next layers learn, or the dense model advance until they can."""
        while waiting and len(learning) < most:
            index, newest = waiting[0], max(states)
            for passed in [number for number in states if number < min(index, newest)]:
                del states[passed]
            needed = index, index + 1, options.end_of_look_ahead(index, layers)
            if newest < needed[-1]:
                advance(newest)
                return
            start(index, [states[number] for number in needed])

    def advance(index: int) -> None:
        if index not in advancing:
            advancing.add(index)
            pool.submit(partial(arrive, index + 1), "advance", index, states[index])

    def start(index: int, exercise: list[Any]) -> None:
        waiting.remove(index)
        learning.add(index)
        layer = source(index)
        arguments = index, layer.shape, pack_all(state_of(layer)), *exercise
        pool.submit(partial(receive, index), "distill", *arguments)

    def receive(index: int, finished: Finished, lesson: DistillationReport) -> None:
        sink(index, finished, lesson)
        learning.remove(index)
        progress.advance()
        go_on()

    if waiting:
        pool.submit(partial(arrive, 0), "embed", pool.put(tokens))
    pool.run()


def merge_shards(
    pool: WorkerPool,
    shards: Mapping[str, Sequence[str]],
    accept: Callable[[str, WrittenFile], None],
    build: Callable[[str], None],
    most: int,
    progress: Progress,
) -> None:
    """Let the workers merge parts into shards, ``most`` of these at a time; what no worker can merge is built here.

    Args:
        shards: the names of each shard's parts.
        accept: called with each shard and the file that a worker has written for it.
        build: builds a shard here.
    """
    progress.stage("Assembling", len(shards))
    waiting = deque(shards)

    def submit() -> None:
        if waiting:
            shard = waiting.popleft()
            pool.submit(partial(receive, shard), "merge", tuple(shards[shard]))

    def receive(shard: str, written: WrittenFile | None) -> None:
        if written is None:
            build(shard)
        else:
            accept(shard, written)
        progress.advance()
        submit()

    for _ in range(most):
        submit()
    pool.run()
