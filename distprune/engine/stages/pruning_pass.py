"""The pruning pass: blocks in parallel, and inside a block each layer on its pruned predecessors' output."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

from distprune.engine.run.journal import entry_of
from distprune.engine.run.states import DENSE, MOMENTS, PRUNED, load_states, save_states
from distprune.engine.stages.chunked_layer import ChunkedLayer
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.host_tensor import HostTensor, pack_all
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.report import Report
from distprune.engine.worker.task import Later
from distprune.layers.shapes import LayerShape
from distprune.methods import Profile

#: Called with each pruned layer as soon as it is there: index, tensors or file, and what its task tells.
PrunedSink = Callable[[int, Finished, Report], None]


class PruningPass:
    """The pruning pass of one run.

    A task is one layer, or some of its experts, so a lost worker costs no more than that. Pruned layers go to ``sink``
    while the workers go on: two at a time are held here, at most. What waits in the journal is read when its layer's
    turn comes.

    Args:
        plan: the shape of every layer.
        profiles: what the passes before have left of every layer.
        sink: gets each pruned layer.
        is_last: whether no further round prunes the dense model again.
    """

    def __init__(
        self,
        context: RunContext,
        plan: Sequence[LayerShape],
        profiles: Sequence[Profile],
        sink: PrunedSink,
        is_last: bool = True,
    ):
        self.is_last = is_last
        self.context, self.plan, self.profiles, self.sink = context, plan, profiles, sink
        self.pool, self.journal = context.pool, context.journal
        self._done: set[int] = set()

    def run(self, done: Collection[int]) -> None:
        """Prune all layers but those that are ``done``."""
        self._done.update(done)
        layers, length = self.context.layers, self.context.block_length
        self.context.progress.stage("Pruning", layers, len(done))
        for start in range(0, layers, length):
            block = range(start, min(start + length, layers))
            index = next((index for index in block if index not in done), None)
            if index is not None:
                self._begin(index, is_first=index == start)
        with self.pool.write_behind() as self._write:
            self.pool.run()

    def _begin(self, index: int, is_first: bool) -> None:
        """Prune a block from its first layer on, or from where an earlier run has left it."""
        states = Later(partial(self._stored_states, DENSE if is_first else PRUNED, index))
        self._submit(index, states, Later(partial(self._stored_moments, index)) if is_first else {})

    def _submit(self, index: int, hidden_states: Any, carried: Any) -> None:
        profile = Later(lambda: pack_all(self.profiles[index]))
        propagates = not self.context.ends_block(index)
        dense = self._dense_states(index)
        task = Prune(index, hidden_states, self.plan[index], profile, carried, propagates, **dense)
        receive = partial(self._receive, index)
        if index in self.context.mixtures_in_chunks:
            ChunkedLayer(self.pool, task, self.context.chunks_of(self.plan[index].ffn), receive).submit()
        else:
            self.pool.submit(task, receive)

    def _dense_states(self, index: int) -> dict[str, Later]:
        """The dense model's, of a layer that is pruned towards them; those at the input, if it is pruned on others."""
        if index not in self.context.aiming:
            return {}
        given = {} if self.context.begins_block(index) else {"dense_input": index}
        places = {**given, "dense_output": index + 1}
        return {name: Later(partial(self._stored_states, DENSE, place)) for name, place in places.items()}

    def _stored_states(self, kind: str, index: int) -> Any:
        return self.pool.put(load_states(self.journal, kind, index))

    def _stored_moments(self, index: int) -> Any:
        return pack_all(self.journal.tensors(entry_of(MOMENTS, index)))

    def _receive(self, index: int, finished: Finished, output: HostTensor | None, report: Report) -> None:
        if not self.context.ends_block(index):
            self._submit(index + 1, self.pool.put(output), {})
        self._write(partial(self._keep, index, finished, output, report))

    def _keep(self, index: int, finished: Finished, output: HostTensor | None, report: Report) -> None:
        if output is not None:
            save_states(self.journal, PRUNED, index + 1, [output])
        self.sink(index, finished, report)
        self.journal.remove(entry_of(PRUNED, index))
        self._done.add(index)
        if self.is_last:
            self._forget_dense(index)
        self.context.progress.advance()

    def _forget_dense(self, index: int) -> None:
        """Remove what no layer needs any more of what the passes through the dense model have left."""
        self.journal.remove(entry_of(MOMENTS, index))
        for place in (index, index + 1):
            if self._done.issuperset(self.context.pruned_with(place)):
                self.journal.remove(entry_of(DENSE, place))
