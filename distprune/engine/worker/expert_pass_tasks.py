"""Tasks of the passes through a layer whose experts come a chunk at a time, so that workers share its experts.

Forward: it is noted which tokens reach which expert, every chunk of experts runs on its own tokens, and what all give
becomes the layer's output. Backward the same, and then the gradient goes to what the experts give, through every chunk,
and from there to the layer's input. All samples pass at once; no more moments of single experts are held than a
chunk's, from which the chunk's part of the profile is made at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from distprune.checks import solving
from distprune.engine.worker.host_tensor import map_leaves
from distprune.engine.worker.layer_worker import LayerWorker, moved
from distprune.engine.worker.open_layers import EXPERT_TOKENS, expert_tokens, is_of_experts, token_counts
from distprune.engine.worker.task import Task
from distprune.layers.chunked_pass import AFTER_EXPERTS, ChunkedPass, ExpertPasses, Routed
from distprune.layers.parts import Experts, map_tensors
from distprune.methods import Profile
from distprune.statistics import LayerStatistics, Moment, sites_of

#: Moments as :meth:`LayerStatistics.to_values` gives them.
Seen = Mapping[str, Tensor | int]


# ---------------------------------------------------------------- moments


@dataclass(frozen=True)
class PassMoments:
    """The moments that a pass collects of a layer with a mixture.

    Attributes:
        profiled: those of the profile.
        overview: what profiles of single experts need besides.
        routing: what tells how many tokens each expert has seen.
    """

    profiled: Sequence[Moment] = ()
    overview: Sequence[Moment] = ()
    routing: Sequence[Moment] = ()

    @classmethod
    def of(cls, worker: LayerWorker, index: int, *, backward: bool) -> PassMoments:
        """Those of the dense pass or the gradient pass, of which one makes the profile."""
        if worker.has_gradient_pass and not backward:
            return cls()
        shape, method = worker.architecture.dense_shape(index), worker.method
        gradients = method.gradient_moments(shape) if backward else ()
        profiled = *method.dense_moments(shape), *gradients
        return cls(profiled, method.overview_moments(shape), token_counts(shape.ffn.count))

    @cached_property
    def after(self) -> list[Moment]:
        """At what the mixture gives."""
        return [moment for moment in self._of_all if {*moment.sites} <= AFTER_EXPERTS]

    @cached_property
    def others(self) -> list[Moment]:
        """Of all else that every token passes through."""
        return [moment for moment in self._of_all if moment not in self.after]

    @cached_property
    def _of_all(self) -> list[Moment]:
        return [moment for moment in self.profiled if not is_of_experts(moment)]

    def of_chunk(self, own: range) -> list[Moment]:
        """Of some experts."""
        return [moment for moment in (*self.profiled, *self.routing) if moment.site.expert in own]

    def overview_of(self, own: range) -> list[Moment]:
        """What is to be known of some experts before any is profiled."""
        return [moment for moment in self.overview if moment.site.expert in own]

    def seen_in(self, told: Iterable[Seen], device: torch.device) -> LayerStatistics:
        """All that was seen so far of what the profile needs."""
        found = {name: value for each in told for name, value in each.items()}
        found = map_leaves(found, Tensor, lambda tensor: tensor.to(device))
        there = [moment for moment in (*self._of_all, *self.overview) if str(moment) in found]
        return LayerStatistics.from_tensors(found, there) or LayerStatistics(())


def watching(statistics: LayerStatistics, moments: Sequence[Moment]) -> dict[str, object]:
    """What a pass is told to observe."""
    return {"observe": statistics.update, "sites": sites_of(moments)} if moments else {}


def told(statistics: LayerStatistics, moments: Sequence[Moment]) -> Seen:
    """What was seen, for other tasks."""
    return map_leaves(statistics.to_values(moments), Tensor, Tensor.cpu) if moments else {}


# ---------------------------------------------------------------- what tasks have in common


@dataclass(frozen=True)
class MixtureTask(Task):
    """A task of a layer with a mixture, in the dense pass; subclasses of subclasses are of the gradient pass."""

    backward: ClassVar[bool] = False
    index: int

    def moments(self, worker: LayerWorker) -> PassMoments:
        return PassMoments.of(worker, self.index, backward=self.backward)

    def dtype(self, worker: LayerWorker) -> torch.dtype:
        return worker.runner.gradient_dtype if self.backward else worker.runner.dtype

    def passing(self, worker: LayerWorker, hidden_states: Tensor, routed: Iterable[Routed] = ()) -> ChunkedPass:
        """Passes of the dense layer over hidden states."""
        frame = worker.read_layer(self.index).to(worker.device)
        return ChunkedPass(worker.runner, frame, self.index, hidden_states, self.dtype(worker), routed)


@dataclass(frozen=True)
class ChunkTask(MixtureTask):
    """A task of one chunk of experts.

    Attributes:
        chunk: which one.
        routed: what the experts are called with.
    """

    chunk: int
    routed: list[Routed]

    def read(self, worker: LayerWorker) -> tuple[range, Experts]:
        """The chunk's numbers in the layer, and the chunk."""
        worker.close()
        chunks = worker.chunks(self.index)
        frame = worker.model.read_frame(self.index, worker.architecture.names(self.index).is_of_router)
        assert chunks is not None and isinstance(frame.ffn, Experts)
        own = chunks.numbers(frame.ffn.shape.count)[self.chunk]
        return own, chunks.take(frame.ffn, own)

    def passes(self, worker: LayerWorker) -> ExpertPasses:
        return ExpertPasses(worker.runner, self.index, self.routed, self.dtype(worker))

    def profile(
        self, worker: LayerWorker, own: range, experts: Experts, statistics: LayerStatistics, seen: Sequence[Seen]
    ) -> dict[str, Tensor]:
        """The part of the profile that is made of the chunk."""
        moments, found = self.moments(worker), dict[str, Tensor]()
        if not moments.routing:
            return found
        found[EXPERT_TOKENS] = expert_tokens([m for m in moments.routing if m.site.expert in own], statistics)
        overall = moments.seen_in(seen, worker.solve_device)
        with solving(worker.method.name, self.index):
            profiler = worker.method.expert_profiler(worker.model.read_frame(self.index, lambda _: False), overall)
            if profiler is not None:
                here = map_tensors(experts, lambda tensor: tensor.to(worker.solve_device))
                found |= moved(profiler(here, own, statistics), "cpu")
        return found


# ---------------------------------------------------------------- forward


@dataclass(frozen=True)
class RouteTokens(MixtureTask):
    """What the layer's experts are called with; in the dense pass also what is seen before them."""

    results: ClassVar[int] = 2
    hidden_states: Tensor

    def run(self, worker: LayerWorker) -> tuple[list[Routed], Seen]:
        passing = self.passing(worker, self.hidden_states)
        others = [] if self.backward else self.moments(worker).others
        statistics = LayerStatistics(others, worker.solve_device)
        passing.route(**watching(statistics, others))
        return passing.routed, told(statistics, others)


@dataclass(frozen=True)
class ForwardExperts(ChunkTask):
    """What a chunk's experts give at their tokens of every micro-batch, and what is to be known of all first."""

    results: ClassVar[int] = 2

    def run(self, worker: LayerWorker) -> tuple[list[Tensor], Seen]:
        own, experts = self.read(worker)
        overview = self.moments(worker).overview_of(own)
        statistics = LayerStatistics(overview, worker.solve_device)
        outputs = self.passes(worker).outputs(own, experts, **watching(statistics, overview))
        return outputs, told(statistics, overview)


@dataclass(frozen=True)
class ForwardJoined(MixtureTask):
    """The layer's output hidden states, and what is seen after the experts.

    Attributes:
        hidden_states: at its input.
        routed: what its experts are called with.
        outputs: what each chunk has given.
    """

    results: ClassVar[int] = 2
    hidden_states: Tensor
    routed: list[Routed]
    outputs: list[list[Tensor]]

    def run(self, worker: LayerWorker) -> tuple[Tensor, Seen]:
        passing, after = self.passing(worker, self.hidden_states, self.routed), self.moments(worker).after
        add_all(worker, passing, self.outputs)
        statistics = LayerStatistics(after, worker.solve_device)
        return passing.output(**watching(statistics, after)), told(statistics, after)


def add_all(worker: LayerWorker, passing: ChunkedPass, outputs: Sequence[Iterable[Tensor]]) -> None:
    """Add what the chunks of a dense layer's experts have given, in their order."""
    for own, given in zip(numbers_of_chunks(worker, passing.index), outputs, strict=True):
        passing.add_outputs(own, given)


def numbers_of_chunks(worker: LayerWorker, index: int) -> list[range]:
    chunks = worker.chunks(index)
    assert chunks is not None
    return chunks.numbers(worker.architecture.dense_shape(index).ffn.count)


@dataclass(frozen=True)
class ProfileExperts(ChunkTask):
    """A chunk's part of the profile, where the dense pass makes it.

    Attributes:
        seen: before the experts, and of all of them.
    """

    seen: list[Seen]

    def run(self, worker: LayerWorker) -> dict[str, Tensor]:
        own, experts = self.read(worker)
        moments = self.moments(worker).of_chunk(own)
        statistics = LayerStatistics(moments, worker.solve_device)
        self.passes(worker).observe(own, experts, statistics.update, sites_of(moments))
        return self.profile(worker, own, experts, statistics, self.seen)


@dataclass(frozen=True)
class ProfileMixture(MixtureTask):
    """The profile, except for what is made of single chunks.

    Attributes:
        seen: all.
    """

    seen: list[Seen]

    def run(self, worker: LayerWorker) -> Profile:
        frame = worker.read_layer(self.index).to(worker.solve_device)
        statistics = self.moments(worker).seen_in(self.seen, worker.solve_device)
        with solving(worker.method.name, self.index):
            return moved(worker.method.profile(frame, statistics), "cpu")


# ---------------------------------------------------------------- backward


@dataclass(frozen=True)
class RouteTokensAgain(RouteTokens):
    """In the gradient pass."""

    backward: ClassVar[bool] = True


@dataclass(frozen=True)
class ForwardExpertsAgain(ForwardExperts):
    """In the gradient pass."""

    backward: ClassVar[bool] = True


@dataclass(frozen=True)
class GradientAtExperts(MixtureTask):
    """The loss's gradient at what all experts give, of every micro-batch, what that is, and what is seen there.

    Attributes:
        hidden_states: at the layer's input.
        gradient: at its output.
        routed, outputs: as of :class:`ForwardJoined`.
    """

    backward: ClassVar[bool] = True
    results: ClassVar[int] = 3
    hidden_states: Tensor
    gradient: Tensor
    routed: list[Routed]
    outputs: list[list[Tensor]]

    def run(self, worker: LayerWorker) -> tuple[list[Tensor], list[Tensor], Seen]:
        passing, after = self.passing(worker, self.hidden_states, self.routed), self.moments(worker).after
        add_all(worker, passing, self.outputs)
        statistics = LayerStatistics(after, worker.solve_device)
        gradients = passing.backward_to_experts(self.gradient, **watching(statistics, after))
        totals = [routed.given(routed.inputs) for routed in passing.routed]
        return gradients, totals, told(statistics, after)


@dataclass(frozen=True)
class BackwardExperts(ChunkTask):
    """The gradients at what a chunk's experts are called with, of every micro-batch, and their part of the profile.

    Attributes:
        gradients: at what all experts give together.
        seen: after the experts, and of all of them.
    """

    backward: ClassVar[bool] = True
    results: ClassVar[int] = 2
    gradients: list[Tensor]
    seen: list[Seen]

    def run(self, worker: LayerWorker) -> tuple[list[tuple[Tensor, Tensor]], dict[str, Tensor]]:
        own, experts = self.read(worker)
        moments = self.moments(worker).of_chunk(own)
        statistics = LayerStatistics(moments, worker.solve_device)
        found = self.passes(worker).gradients(own, experts, self.gradients, **watching(statistics, moments))
        return found, self.profile(worker, own, experts, statistics, self.seen)


@dataclass(frozen=True)
class BackwardJoined(MixtureTask):
    """The loss's gradient at the layer's input, and what is seen of all but the experts.

    Attributes:
        hidden_states: at the layer's input.
        gradient: at its output.
        routed: what its experts are called with.
        totals: what all experts give together.
        of_experts: the gradients that each chunk has given.
    """

    backward: ClassVar[bool] = True
    results: ClassVar[int] = 2
    hidden_states: Tensor
    gradient: Tensor
    routed: list[Routed]
    totals: list[Tensor]
    of_experts: list[list[tuple[Tensor, Tensor]]]

    def run(self, worker: LayerWorker) -> tuple[Tensor, Seen]:
        passing, others = self.passing(worker, self.hidden_states, self.routed), self.moments(worker).others
        for routed, total in zip(passing.routed, self.totals, strict=True):
            routed.total = total
        for own, gradients in zip(numbers_of_chunks(worker, self.index), self.of_experts, strict=True):
            passing.add_gradients(own, gradients)
        statistics = LayerStatistics(others, worker.solve_device)
        at_input = passing.backward_to_input(self.gradient, **watching(statistics, others))
        return at_input, told(statistics, others)


@dataclass(frozen=True)
class ProfileMixtureAgain(ProfileMixture):
    """In the gradient pass."""

    backward: ClassVar[bool] = True
