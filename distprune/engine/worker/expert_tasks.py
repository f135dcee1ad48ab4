"""The tasks that prune a layer whose experts come a chunk at a time, so that workers share the experts of one layer.

First all but the experts is pruned, and it is noted which tokens reach which expert; then every chunk of experts is
pruned on its own tokens; and where the next layer needs it, what all of them give becomes the layer's output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

from distprune.checks import check_solution, solving
from distprune.engine.worker.layer_pruning import LayerPruning
from distprune.engine.worker.layer_worker import Finished, LayerWorker, Piece, moved
from distprune.engine.worker.open_layers import is_of_experts
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.report import Report, Stopwatch, convergence_warnings
from distprune.engine.worker.task import Task
from distprune.layers.chunked_pass import ChunkedPass, ExpertPasses, Routed
from distprune.layers.names import origin_of, stored_like
from distprune.layers.parts import DecoderLayer, Experts, map_tensors
from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods import ChangeExperts, LayerToPrune, Profile
from distprune.statistics import LayerStatistics, Moment, sites_of

#: Does what :meth:`LayerToPrune.change_experts` says.
ChangesExperts = Callable[[DecoderLayer, Sequence[Moment] | None, ChangeExperts], tuple[DecoderLayer, LayerStatistics]]


# ---------------------------------------------------------------- all but the experts


@dataclass(frozen=True)
class PruneAround(Task):
    """All of a layer pruned but its experts, and what these are called with in the pruned layer.

    It gives what is finished of the layer; the same by its names in the module, if the next layer needs the output;
    every micro-batch's calls, if anything is to be seen of the experts; and a report.

    Attributes:
        index, hidden_states, planned, profile, carried, propagates: as of :class:`Prune`.
    """

    results: ClassVar[int] = 4
    index: int
    hidden_states: Tensor
    planned: LayerShape
    profile: Profile
    carried: Mapping[str, Tensor]
    propagates: bool

    @classmethod
    def of(cls, whole: Prune) -> PruneAround:
        """The first of the tasks that take the place of one that prunes a whole layer."""
        return cls(**{own.name: getattr(whole, own.name) for own in fields(cls)})

    def run(self, worker: LayerWorker) -> tuple[Finished, dict[str, Tensor], list[Routed], Report]:
        clock = Stopwatch()
        frame = worker.read_layer(self.index)
        pruning = PruningAround(worker, self.index, frame, self.planned, self.hidden_states, self.propagates)
        clock.lap("read")
        statistics = pruning.statistics(self.carried)
        clock.lap("statistics")
        with convergence_warnings() as warned, solving(worker.method.name, self.index):
            pruned = pruning.prune(statistics, self.profile)
        clock.lap("solve")
        if self.propagates and pruning.routed is None and isinstance(pruned.ffn, Experts):
            pruning.route(pruned)
        clock.lap("propagate")
        names = worker.architecture.names(self.index)
        state = {name: tensor for name, tensor in names.state_of(pruned).items() if not names.is_of_experts(name)}
        piece = worker.write(worker.model.state_to_disk(self.index, state, self.planned))
        pairs = None if pruned.attention is None else pruned.attention.rotary_pairs
        kept = state if self.propagates else {}
        return Finished(piece, pairs), kept, pruning.routed or [], Report(clock.laps, warned)


@dataclass
class PruningAround(LayerPruning):
    """A layer of which all but the experts is being pruned.

    Attributes:
        propagates: whether its output will be asked for.
        routed: what its experts are called with, where that was noted.
    """

    propagates: bool
    routed: list[Routed] | None = field(default=None, init=False)

    def observe(self, variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        """Moments of what every token passes through."""
        shared = [moment for moment in moments if not is_of_experts(moment)]
        return self._pass(variation, shared)[1] if shared else LayerStatistics(())

    def given(self, **known: object) -> LayerToPrune:
        layer = self.layer.to(self.worker.solve_device)
        return LayerInChunks(
            self.index,
            layer,
            self.planned,
            observe=self.observe,
            sparsity=self.worker.config.sparsity,
            changing=self._leave_experts,
            **known,
        )

    def route(self, layer: DecoderLayer, shared: Sequence[Moment] = ()) -> LayerStatistics:
        """Note what the experts of a layer are called with, and see what every token passes through."""
        passing, statistics = self._pass(layer, shared)
        self.routed = passing.routed
        return statistics

    def _leave_experts(
        self, variation: DecoderLayer, moments: Sequence[Moment] | None, change: ChangeExperts
    ) -> tuple[DecoderLayer, LayerStatistics]:
        """As :meth:`LayerToPrune.change_experts` says, without the change."""
        assert isinstance(variation.ffn, Experts) and isinstance(self.planned.ffn, ExpertsShape)
        asked = all_moments(self.worker, self.layer.shape, self.planned, moments)
        shared = [moment for moment in asked if not is_of_experts(moment)] if moments is not None else []
        # In the dtypes that it is stored in, so that its experts see what they will see in the pruned layer.
        stored = stored_like(variation, self.layer, self.worker.architecture.names(self.index))
        statistics = LayerStatistics(())
        if self.propagates or shared or any(map(is_of_experts, asked)):
            statistics = self.route(stored, shared)
        return replace(variation, ffn=as_wide(variation.ffn, self.planned.ffn.width)), statistics

    def _pass(self, variation: DecoderLayer, moments: Sequence[Moment]) -> tuple[ChunkedPass, LayerStatistics]:
        passing = ChunkedPass(self.worker.runner, variation, self.index, self.hidden_states)
        statistics = LayerStatistics(moments, self.worker.solve_device)
        passing.route(statistics.update if moments else None, sites_of(moments))
        return passing, statistics


@dataclass(frozen=True)
class LayerInChunks(LayerToPrune):
    """A layer whose experts come a chunk at a time.

    Attributes:
        changing: what changes them.
    """

    changing: ChangesExperts

    def change_experts(
        self, variation: DecoderLayer, moments: Sequence[Moment] | None, change: ChangeExperts
    ) -> tuple[DecoderLayer, LayerStatistics]:
        return self.changing(variation, moments, change)


def all_moments(
    worker: LayerWorker, dense: LayerShape, planned: LayerShape, moments: Sequence[Moment] | None
) -> Sequence[Moment]:
    """The moments that :meth:`LayerToPrune.change_experts` is asked for."""
    return worker.method.pruning_moments(dense, planned) if moments is None else moments


def as_wide(experts: Experts, width: int) -> Experts:
    """A mixture whose experts are elsewhere, of another width."""
    assert experts.inputs.is_meta and experts.down.is_meta
    bias = experts.input_bias
    return replace(
        experts,
        inputs=experts.inputs[:, :, :width],
        down=experts.down[:, :, :width],
        input_bias=None if bias is None else bias[:, :, :width],
    )


# ---------------------------------------------------------------- the experts


class ExpertsChanged(Exception):
    """A method has changed the experts of a chunk; what it does afterwards was done by :class:`PruneAround`."""


@dataclass(frozen=True)
class PruneExperts(Task):
    """A chunk of a layer's experts pruned.

    It gives what is finished of the layer; what these experts give at their tokens of every micro-batch, if the next
    layer needs the output; and a report.

    Attributes:
        index, planned, profile, propagates: as of :class:`Prune`.
        chunk: which one.
        routed: what the pruned layer's experts are called with.
    """

    results: ClassVar[int] = 3
    index: int
    planned: LayerShape
    profile: Profile
    propagates: bool
    chunk: int
    routed: list[Routed]

    def run(self, worker: LayerWorker) -> tuple[Piece, list[Tensor], Report]:
        clock = Stopwatch()
        layer, names = self._without_values(worker), worker.architecture.names(self.index)
        with convergence_warnings() as warned, solving(worker.method.name, self.index):
            own, changed = self._change(worker, layer, clock)
        check_solution(DecoderLayer(None, changed), self.index)
        dtypes, state = worker.model.stored_dtypes(self.index), names.state_of(DecoderLayer(None, changed))
        state = {n: tensor.to("cpu", dtypes[n]) for n, tensor in state.items() if names.is_of_experts(n)}
        clock.lap("solve")
        outputs: list[Tensor] = []
        if self.propagates:
            outputs = self._passes(worker).outputs(own, names.with_tensors(changed, state))
        clock.lap("propagate")
        piece = worker.write(worker.model.state_to_disk(self.index, state, self.planned, own.start))
        return piece, outputs, Report(clock.laps, warned)

    def _without_values(self, worker: LayerWorker) -> DecoderLayer:
        """The dense layer with the router's values alone, and attention as if pruned: so nothing is done to that."""
        worker.close()
        names = worker.architecture.names(self.index)
        layer = worker.model.read_frame(self.index, names.is_of_router)
        dtypes, family = worker.model.stored_dtypes(self.index), worker.architecture.family
        state = {
            name: torch.empty(dims, dtype=dtypes[origin_of(name, dtypes, family)], device="meta")
            for name, dims in worker.architecture.layer_tensors(self.index, self.planned).items()
        }
        with_planned = replace(layer, attention=names.layer_from_state(state, self.planned).attention)
        return with_planned.to(worker.solve_device)

    def _change(self, worker: LayerWorker, layer: DecoderLayer, clock: Stopwatch) -> tuple[range, Experts]:
        """The chunk's numbers among the pruned layer's experts, and what they become."""
        results: list[tuple[range, Experts]] = []

        def change_chunk(
            variation: DecoderLayer, moments: Sequence[Moment] | None, change: ChangeExperts
        ) -> tuple[DecoderLayer, LayerStatistics]:
            assert isinstance(variation.ffn, Experts)
            chunks = worker.chunks(self.index)
            assert chunks is not None
            own = chunks.numbers(variation.ffn.shape.count)[self.chunk]
            experts = chunks.take(variation.ffn, own)
            clock.lap("read")
            asked = all_moments(worker, dense, self.planned, moments)
            seen = self._see(worker, own, experts, [m for m in asked if is_of_experts(m) and m.site.expert in own])
            clock.lap("statistics")
            here = map_tensors(experts, lambda tensor: tensor.to(worker.solve_device))
            results.append((own, change(here, own, seen)))
            raise ExpertsChanged

        dense = worker.architecture.dense_shape(self.index)
        profile = moved(self.profile, worker.solve_device)
        known = LayerStatistics(()), profile, unseen, worker.config.sparsity
        given = LayerInChunks(self.index, layer, self.planned, *known, change_chunk)
        try:
            pruned = worker.method.prune(given)
            change_chunk(pruned, (), lambda experts, *_: experts)  # nothing was to be changed in them
        except ExpertsChanged:
            pass
        return results[0]

    def _see(self, worker: LayerWorker, own: range, experts: Experts, moments: Sequence[Moment]) -> LayerStatistics:
        statistics = LayerStatistics(moments, worker.solve_device)
        if moments:
            self._passes(worker).observe(own, experts, statistics.update, sites_of(moments))
        return statistics

    def _passes(self, worker: LayerWorker) -> ExpertPasses:
        return ExpertPasses(worker.runner, self.index, self.routed)


def unseen(variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
    """Stands for :attr:`LayerToPrune.observe` where all that is to be observed so was observed before."""
    raise AssertionError("a method observes a layer of which it has pruned all except the experts")


# ---------------------------------------------------------------- the output


@dataclass(frozen=True)
class JoinExperts(Task):
    """The pruned layer's output hidden states.

    Attributes:
        index, hidden_states, planned: as of :class:`Prune`.
        state: the pruned layer's tensors except its experts', by their names in the module.
        rotary_pairs: see :class:`Finished`.
        routed: what its experts are called with.
        outputs: of every chunk, what :class:`PruneExperts` has given.
    """

    index: int
    hidden_states: Tensor
    planned: LayerShape
    state: Mapping[str, Tensor]
    rotary_pairs: Tensor | None
    routed: list[Routed]
    outputs: list[list[Tensor]]

    def run(self, worker: LayerWorker) -> Tensor:
        names, experts = worker.architecture.names(self.index), self.planned.ffn
        state = {
            name: self.state[name] if name in self.state else torch.empty(dims, device="meta")
            for name, dims in worker.architecture.layer_tensors(self.index, self.planned).items()
        }
        layer = names.layer_from_state(state, self.planned, self.rotary_pairs)
        if not isinstance(experts, ExpertsShape):
            return worker.runner.run(layer, self.index, self.hidden_states)
        passing = ChunkedPass(worker.runner, layer, self.index, self.hidden_states, routed=self.routed)
        chunks = worker.chunks(self.index)
        assert chunks is not None
        for own, outputs in zip(chunks.numbers(experts.count), self.outputs, strict=True):
            passing.add_outputs(own, outputs)
        return passing.output()
