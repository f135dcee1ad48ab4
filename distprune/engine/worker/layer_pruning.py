"""How a layer is run, changed and written while it is pruned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from distprune.checks import check_solution
from distprune.engine.worker.dense_states import DenseStates
from distprune.engine.worker.layer_worker import LayerWorker, moved
from distprune.layers.names import stored_like
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods import LayerToPrune, Profile
from distprune.statistics import LayerStatistics, Moment, sites_of


@dataclass
class LayerPruning:
    """A layer that is being pruned on one worker.

    Attributes:
        worker: where.
        index: the layer.
        layer: as the checkpoint has it.
        planned: the shape that it is to have.
        hidden_states: at its input.
        dense_input, dense_output: the dense model's hidden states at its input, where they are other ones, and at its
            output; None where the method does not ask for them.
        seen_of_dense: moments of the dense layer on these hidden states, where several variations ask for them.
    """

    worker: LayerWorker
    index: int
    layer: DecoderLayer
    planned: LayerShape
    hidden_states: Tensor
    dense_input: Tensor | None = field(default=None, kw_only=True)
    dense_output: Tensor | None = field(default=None, kw_only=True)
    seen_of_dense: dict[tuple[Moment, ...], LayerStatistics] | None = field(default=None, kw_only=True)

    def observe(self, variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        """Moments inside a variation of the layer."""
        if self.seen_of_dense is None or variation is not self._on_solver:
            return self._observe(variation, moments)
        asked = tuple(moments)
        if asked not in self.seen_of_dense:
            self.seen_of_dense[asked] = self._observe(variation, moments)
        return self.seen_of_dense[asked]

    def _observe(self, variation: DecoderLayer, moments: Sequence[Moment]) -> LayerStatistics:
        statistics = LayerStatistics(moments, self.worker.solve_device)
        update, sites = statistics.update, sites_of(moments)
        if self._dense_states is not None:
            update, sites = self._dense_states.observing(update, sites)
        self.worker.runner.observe(variation, self.index, self.hidden_states, update, sites)
        return statistics

    @cached_property
    def _on_solver(self) -> DecoderLayer:
        return self.layer.to(self.worker.solve_device)

    @cached_property
    def _dense_states(self) -> DenseStates | None:
        if self.dense_output is None:
            return None
        given = self.hidden_states if self.dense_input is None else self.dense_input
        return DenseStates(self.worker.runner, self.layer, self.index, given, self.dense_output)

    def statistics(self, carried: Mapping[str, Tensor]) -> LayerStatistics:
        """What the method asks for: carried from the dense pass, if that is all, or observed now."""
        moments = self.worker.method.pruning_moments(self.layer.shape, self.planned)
        carried = moved(carried, self.worker.solve_device)
        return LayerStatistics.from_tensors(carried, moments) or self.observe(self.layer, moments)

    def prune(self, statistics: LayerStatistics, profile: Profile) -> DecoderLayer:
        """The layer in its planned shape, in the dtypes of the checkpoint's tensors."""
        worker, index = self.worker, self.index
        if self.layer.attention is None and self.layer.ffn is None:  # nothing of it is known
            return self.layer
        profile = moved(profile, worker.solve_device)
        pruned = worker.method.prune(self.given(statistics=statistics, profile=profile))
        if pruned.shape != self.planned:
            raise AssertionError(f"{worker.method.name} gave layer {index} {pruned.shape}, planned {self.planned}")
        pruned = stored_like(pruned, self.layer, worker.architecture.names(index))
        check_solution(pruned, index)
        return pruned

    def given(self, **known: object) -> LayerToPrune:
        """What the method is given; ``known`` are the statistics and the profile."""
        return LayerToPrune(
            self.index,
            self._on_solver,
            self.planned,
            observe=self.observe,
            sparsity=self.worker.config.sparsity,
            sees_errors=self.dense_output is not None,
            **known,
        )
