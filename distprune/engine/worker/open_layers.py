"""A dense layer in the dense pass or the gradient pass: whole, or its experts a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distprune.checks import solving
from distprune.engine.worker.layer_worker import LayerWorker, moved
from distprune.layers.chunked_pass import AFTER_EXPERTS, ChunkedPass
from distprune.layers.expert_chunks import ExpertChunks
from distprune.layers.parts import DecoderLayer, Experts, map_tensors
from distprune.layers.runner import Observer
from distprune.layers.sites import ROUTER_WEIGHT, Site
from distprune.methods import Method, Profile
from distprune.statistics import LayerStatistics, Mean, Moment, sites_of

#: Beside a method's own profile: how many tokens each expert has seen, (E,).
EXPERT_TOKENS = "expert_tokens"


@dataclass
class OpenLayer:
    """What was seen of how many pieces of the samples.

    Attributes:
        index: the layer.
        layer: its tensors.
        method: the run's.
        solve_device: where moments are kept.
        profiled: the moments for its profile; None where it gets none in this pass.
        carried: those that go to its pruning.
        pieces: how many it has seen.
    """

    index: int
    layer: DecoderLayer
    method: Method
    solve_device: torch.device
    profiled: Sequence[Moment] | None
    carried: Sequence[Moment] = ()
    pieces: int = 0

    @cached_property
    def moments(self) -> tuple[Moment, ...]:
        """All that is collected in this pass."""
        return *(self.profiled or ()), *self.overview, *self.carried, *self.routing

    @cached_property
    def overview(self) -> Sequence[Moment]:
        """What profiles of single experts need besides."""
        return () if self.profiled is None else self.method.overview_moments(self.layer.shape)

    @cached_property
    def routing(self) -> list[Moment]:
        """What tells how many tokens each expert has seen, of a mixture that gets its profile in this pass."""
        if self.profiled is None or not isinstance(self.layer.ffn, Experts):
            return []
        return [Mean(ROUTER_WEIGHT.of(number)) for number in range(self.layer.ffn.shape.count)]

    @cached_property
    def statistics(self) -> LayerStatistics:
        return LayerStatistics(self.moments, self.solve_device)

    @property
    def observation(self) -> dict[str, Any]:
        """What a runner is told to observe."""
        return {"observe": self.statistics.update, "sites": sites_of(self.moments)} if self.moments else {}

    # ---------------------------------------------------------------- a piece of the samples

    def forward(self, worker: LayerWorker, hidden_states: Tensor) -> Tensor:
        """The layer's output hidden states."""
        return worker.runner.run(self.layer, self.index, hidden_states, **self.observation)

    def backward(self, worker: LayerWorker, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient at the layer's input."""
        return worker.runner.backward(self.layer, self.index, hidden_states, gradient, **self.observation)

    # ---------------------------------------------------------------- the end

    def profile(self) -> Profile:
        """What is to be remembered of it."""
        if self.profiled is None:
            return {}
        layer = self.layer.to(self.solve_device)
        with solving(self.method.name, self.index):
            profile = {**self.method.whole_profile(layer, self.statistics)}
        if self.routing:
            profile[EXPERT_TOKENS] = expert_tokens(self.routing, self.statistics)
        return profile


@dataclass
class OpenChunkedLayer(OpenLayer):
    """A mixture's layer whose experts are read a chunk at a time, all samples being one piece.

    No more moments of single experts are held than a chunk's.

    Attributes:
        chunks: how they are read.
    """

    chunks: ExpertChunks | None = None

    def __post_init__(self) -> None:
        self._seen: list[LayerStatistics] = []
        self._of_experts: list[Profile] = []

    def forward(self, worker: LayerWorker, hidden_states: Tensor) -> Tensor:
        chunked = self._begin(worker, hidden_states, worker.runner.dtype)
        after, others = self._sorted_moments()
        chunked.route(*self._watching(others))
        if self.overview:
            self._add_all(chunked)
            self._profile_chunks(chunked.observe)
        else:
            self._profile_chunks(chunked.add)
        return chunked.output(*self._watching(after))

    def backward(self, worker: LayerWorker, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        chunked = self._begin(worker, hidden_states, worker.runner.gradient_dtype)
        after, others = self._sorted_moments()
        chunked.route()
        self._add_all(chunked)
        chunked.backward_to_experts(gradient, *self._watching(after))
        self._profile_chunks(chunked.backward_through)
        return chunked.backward_to_input(gradient, *self._watching(others))

    def profile(self) -> Profile:
        if self.profiled is None:
            return {}
        with solving(self.method.name, self.index):
            shared = self.method.profile(self.layer.to(self.solve_device), self._all_seen)
        names = self._of_experts[0]
        return {**shared, **{name: torch.cat([each[name] for each in self._of_experts]) for name in names}}

    # ---------------------------------------------------------------- its steps

    def _begin(self, worker: LayerWorker, hidden_states: Tensor, dtype: torch.dtype) -> ChunkedPass:
        assert self.pieces == 0
        return ChunkedPass(worker.runner, self.layer, self.index, hidden_states, dtype)

    def _sorted_moments(self) -> tuple[list[Moment], list[Moment]]:
        """Moments of what no single expert sees: at the mixture's output, and elsewhere."""
        moments = [moment for moment in self.profiled or () if not is_of_experts(moment)]
        after = [moment for moment in moments if {*moment.sites} <= AFTER_EXPERTS]
        return after, [moment for moment in moments if moment not in after]

    def _watching(self, moments: Sequence[Moment]) -> tuple[Observer | None, set[Site]]:
        """What a pass is told to observe."""
        if not moments:
            return None, set()
        self._seen.append(statistics := LayerStatistics(moments, self.solve_device))
        return statistics.update, sites_of(moments)

    @property
    def _all_seen(self) -> LayerStatistics:
        """What was seen so far of all but single experts' own moments."""
        self._seen = [LayerStatistics.together(self._seen)]
        return self._seen[0]

    def _chunks(self) -> Iterator[tuple[range, Experts]]:
        assert self.chunks is not None and isinstance(self.layer.ffn, Experts)
        return self.chunks.of(self.layer.ffn)

    def _add_all(self, chunked: ChunkedPass) -> None:
        """The forward pass through all experts, with what is to be known before a chunk can be profiled."""
        for own, experts in self._chunks():
            chunked.add(own, experts, *self._watching([each for each in self.overview if each.site.expert in own]))

    def _profile_chunks(self, run: Callable[..., None]) -> None:
        """A pass through all experts, each chunk of which is profiled when all samples have gone through it."""
        layer, profiler = self.layer.to(self.solve_device), None
        if self.profiled is not None:
            with solving(self.method.name, self.index):
                profiler = self.method.expert_profiler(layer, self._all_seen)
        for own, experts in self._chunks():
            moments = [each for each in (*(self.profiled or ()), *self.routing) if each.site.expert in own]
            statistics = LayerStatistics(moments, self.solve_device)
            run(own, experts, statistics.update if moments else None, sites_of(moments))
            found = {EXPERT_TOKENS: expert_tokens(moments, statistics)} if self.routing else {}
            if profiler is not None:
                here = map_tensors(experts, lambda tensor: tensor.to(self.solve_device))
                with solving(self.method.name, self.index):
                    found |= moved(profiler(here, own, statistics), "cpu")
            self._of_experts.append(found)


def open_layer(
    worker: LayerWorker, index: int, profiled: Sequence[Moment] | None, *, carries: bool = False
) -> OpenLayer:
    """Read a layer for a pass.

    Args:
        profiled: the moments for its profile; None where it gets none in this pass.
        carries: whether moments are collected that go to its pruning.
    """
    layer, chunks = worker.read_layer(index), worker.chunks(index)
    opened = index, layer.to(worker.device), worker.method, worker.solve_device, profiled
    if chunks is not None:
        return OpenChunkedLayer(*opened, chunks=chunks)
    return OpenLayer(*opened, carried=worker.carried_moments(index, layer.shape) if carries else ())


def is_of_experts(moment: Moment) -> bool:
    """Whether it is of a single expert."""
    return any(site.expert is not None for site in moment.sites)


def expert_tokens(routing: Iterable[Moment], statistics: LayerStatistics) -> Tensor:
    """How many tokens the experts of these routers' weights have seen."""
    sites = [moment.site for moment in routing if moment.site.of(0) == ROUTER_WEIGHT.of(0)]
    return torch.tensor([statistics.tokens(site) for site in sites])
