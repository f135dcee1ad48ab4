"""How a layer is run, changed and written while it is pruned: whole, or its experts a chunk at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from distprune.checks import check_solution
from distprune.engine.worker.layer_worker import Finished, LayerWorker
from distprune.engine.worker.open_layers import is_of_experts
from distprune.engine.worker.piecewise_target import PiecewiseTarget, target_of
from distprune.layers.chunked_pass import ChunkedPass
from distprune.layers.expert_chunks import ExpertChunks
from distprune.layers.names import origin_of, stored_like
from distprune.layers.parts import DecoderLayer, Experts, map_tensors
from distprune.layers.shapes import LayerShape
from distprune.methods import ChangeExperts, LayerToPrune
from distprune.statistics import LayerStatistics, Moment, sites_of


@dataclass
class LayerPruning:
    """A layer that is pruned as a whole.

    Attributes:
        worker: where.
        index: the layer.
        layer: as the checkpoint has it.
        planned: the shape that it is to have.
        hidden_states: at its input.
    """

    worker: LayerWorker
    index: int
    layer: DecoderLayer
    planned: LayerShape
    hidden_states: Tensor

    def observe(self, variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        """Moments inside a variation of the layer."""
        statistics = LayerStatistics(moments, self.worker.solve_device)
        sites = sites_of(moments)
        self.worker.runner.observe(variation, self.index, self.hidden_states, statistics.update, sites)
        return statistics

    def to_prune(self, **known: object) -> LayerToPrune:
        """What a method is given; ``known`` are the statistics and the profile."""
        layer = self.layer.to(self.worker.solve_device)
        return LayerToPrune(self.index, layer, self.planned, observe=self.observe, **known)

    def stored(self, pruned: DecoderLayer) -> DecoderLayer:
        """The pruned layer in the dtypes of the checkpoint's tensors."""
        pruned = stored_like(pruned, self.layer, self.worker.architecture.names(self.index))
        check_solution(pruned, self.index)
        return pruned

    def output(self, pruned: DecoderLayer) -> Tensor:
        """The output hidden states of what :meth:`stored` gave."""
        return self.worker.runner.run(pruned, self.index, self.hidden_states)

    def finish(self, pruned: DecoderLayer) -> Finished:
        """Write it."""
        return self.worker.finish(self.index, pruned)


@dataclass(frozen=True)
class LayerInChunks(LayerToPrune):
    """A layer whose experts come a chunk at a time.

    Attributes:
        pruning: what runs and writes them.
    """

    pruning: ChunkedPruning

    def change_experts(
        self, variation: DecoderLayer, moments: Sequence[Moment] | None, change: ChangeExperts
    ) -> tuple[DecoderLayer, LayerStatistics]:
        return self.pruning.change_experts(variation, moments, change)


@dataclass
class ChunkedPruning(LayerPruning):
    """A mixture's layer whose experts are read a chunk at a time, and written as soon as they are changed.

    Attributes:
        chunks: how they are read.
        target: where they are written.
        propagates: whether its output is asked for.
    """

    chunks: ExpertChunks
    target: PiecewiseTarget
    propagates: bool
    _passing: ChunkedPass | None = field(default=None, init=False)

    def observe(self, variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        """Moments of what every token passes through; those of single experts wait for :meth:`change_experts`."""
        shared = [moment for moment in moments if not is_of_experts(moment)]
        return self._route(variation, shared)[1] if shared else LayerStatistics(())

    def to_prune(self, **known: object) -> LayerToPrune:
        layer = self.layer.to(self.worker.solve_device)
        return LayerInChunks(self.index, layer, self.planned, observe=self.observe, pruning=self, **known)

    def stored(self, pruned: DecoderLayer) -> DecoderLayer:
        if self._passing is None:  # nothing was to be changed in them
            pruned, _ = self.change_experts(pruned, (), lambda experts, *_: experts)
        return super().stored(pruned)

    def output(self, pruned: DecoderLayer) -> Tensor:
        assert self._passing is not None
        return self._passing.output(layer=pruned)

    def finish(self, pruned: DecoderLayer) -> Finished:
        names = self.worker.architecture.names(self.index)
        state = {name: tensor for name, tensor in names.state_of(pruned).items() if not names.is_of_experts(name)}
        self._write(state)
        pairs = None if pruned.attention is None else pruned.attention.rotary_pairs
        return Finished(self.target.written(), pairs)

    # ---------------------------------------------------------------- experts

    def change_experts(
        self, variation: DecoderLayer, moments: Sequence[Moment] | None, change: ChangeExperts
    ) -> tuple[DecoderLayer, LayerStatistics]:
        """As :meth:`LayerToPrune.change_experts` says, once."""
        assert self._passing is None and isinstance(variation.ffn, Experts)
        if moments is None:
            asked = self.worker.method.pruning_moments(self.layer.shape, self.planned)
            moments = [moment for moment in asked if is_of_experts(moment)]
        # In the dtypes that it is stored in, so that its experts see what they will see in the pruned layer.
        stored = stored_like(variation, self.layer, self.worker.architecture.names(self.index))
        self._passing, statistics = self._route(stored, [each for each in moments if not is_of_experts(each)])
        changed = None
        for own, experts in self.chunks.of(variation.ffn):
            seen = self._see(
                own, experts, [each for each in moments if is_of_experts(each) and each.site.expert in own]
            )
            here = map_tensors(experts, lambda tensor: tensor.to(self.worker.solve_device))
            changed = self._keep(own, change(here, own, seen))
        assert changed is not None
        return replace(variation, ffn=as_wide(variation.ffn, changed)), statistics

    def _route(self, variation: DecoderLayer, moments: Sequence[Moment]) -> tuple[ChunkedPass, LayerStatistics]:
        passing = ChunkedPass(self.worker.runner, variation, self.index, self.hidden_states)
        statistics = LayerStatistics(moments, self.worker.solve_device)
        passing.route(statistics.update if moments else None, sites_of(moments))
        return passing, statistics

    def _see(self, own: range, experts: Experts, moments: Sequence[Moment]) -> LayerStatistics:
        assert self._passing is not None
        statistics = LayerStatistics(moments, self.worker.solve_device)
        if moments:
            self._passing.observe(own, experts, statistics.update, sites_of(moments))
        return statistics

    def _keep(self, own: range, changed: Experts) -> Experts:
        """Write changed experts, and add what they give to the layer's output. Returns them as they are stored."""
        names, dtypes = self.worker.architecture.names(self.index), self.worker.model.stored_dtypes(self.index)
        check_solution(DecoderLayer(None, changed), self.index)
        state = names.state_of(DecoderLayer(None, changed))
        state = {n: tensor.to("cpu", dtypes[n]) for n, tensor in state.items() if names.is_of_experts(n)}
        self._write(state, own.start)
        stored = names.with_tensors(changed, state)
        if self.propagates:
            assert self._passing is not None
            self._passing.add(own, stored)
        return stored

    def _write(self, state: Mapping[str, Tensor], first_expert: int = 0) -> None:
        self.target.write(self.worker.model.state_to_disk(self.index, state, self.planned, first_expert))


def as_wide(experts: Experts, like: Experts) -> Experts:
    """A mixture whose experts are elsewhere, as wide as some others."""

    def resized(tensor: Tensor | None, other: Tensor | None) -> Tensor | None:
        if tensor is None or other is None:
            return None
        return torch.empty(len(tensor), *other.shape[1:], dtype=other.dtype, device="meta")

    inputs, down = resized(experts.inputs, like.inputs), resized(experts.down, like.down)
    assert inputs is not None and down is not None
    input_bias, down_bias = resized(experts.input_bias, like.input_bias), resized(experts.down_bias, like.down_bias)
    return replace(experts, inputs=inputs, down=down, input_bias=input_bias, down_bias=down_bias)


@contextmanager
def pruning_of(
    worker: LayerWorker, index: int, planned: LayerShape, hidden_states: Tensor, propagates: bool
) -> Iterator[LayerPruning]:
    """Read a layer of the dense model to prune it. What it is written to is there at the end of the block."""
    layer, chunks = worker.read_layer(index), worker.chunks(index)
    layers = worker, index, layer, planned, hidden_states
    if chunks is None:
        yield LayerPruning(*layers)
    else:
        with target_of(worker.parts, expected(worker, index, planned)) as target:
            yield ChunkedPruning(*layers, chunks, target, propagates)


def expected(worker: LayerWorker, index: int, planned: LayerShape) -> dict[str, Tensor]:
    """The tensors of a pruned layer by their names on disk, on the meta device."""
    family, dtypes = worker.architecture.family, worker.model.stored_dtypes(index)
    dims = worker.architecture.layer_tensors(index, planned).items()
    state = {n: torch.empty(each, dtype=dtypes[origin_of(n, dtypes, family)], device="meta") for n, each in dims}
    return worker.model.state_to_disk(index, state, planned)
