"""A dense layer in the dense pass or the gradient pass."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from distprune.checks import solving
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.layers.parts import DecoderLayer, Experts
from distprune.layers.runner import LayerRunner
from distprune.layers.sites import ROUTER_WEIGHT
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
        return token_counts(self.layer.ffn.shape.count)

    @cached_property
    def statistics(self) -> LayerStatistics:
        return LayerStatistics(self.moments, self.solve_device)

    @property
    def observation(self) -> dict[str, Any]:
        """What a runner is told to observe."""
        return {"observe": self.statistics.update, "sites": sites_of(self.moments)} if self.moments else {}

    # ---------------------------------------------------------------- a piece of the samples

    def runner(self, worker: LayerWorker) -> LayerRunner:
        """What runs it on a worker."""
        return worker.runner

    def forward(self, worker: LayerWorker, hidden_states: Tensor) -> Tensor:
        """The layer's output hidden states."""
        return self.runner(worker).run(self.layer, self.index, hidden_states, **self.observation)

    def backward(self, worker: LayerWorker, hidden_states: Tensor, gradient: Tensor) -> Tensor:
        """The loss's gradient at the layer's input."""
        return self.runner(worker).backward(self.layer, self.index, hidden_states, gradient, **self.observation)

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


def open_layer(
    worker: LayerWorker, index: int, profiled: Sequence[Moment] | None, *, carries: bool = False
) -> OpenLayer:
    """Read a layer for a pass.

    Args:
        profiled: the moments for its profile; None where it gets none in this pass.
        carries: whether moments are collected that go to its pruning.
    """
    layer = worker.read_layer(index)
    carried = worker.carried_moments(index, layer.shape) if carries else ()
    return OpenLayer(index, layer.to(worker.device), worker.method, worker.solve_device, profiled, carried)


def token_counts(experts: int) -> list[Moment]:
    """Moments that tell how many tokens each of so many experts has seen, by :func:`expert_tokens`."""
    return [Mean(ROUTER_WEIGHT.of(number)) for number in range(experts)]


def is_of_experts(moment: Moment) -> bool:
    """Whether it is of a single expert."""
    return any(site.expert is not None for site in moment.sites)


def expert_tokens(routing: Iterable[Moment], statistics: LayerStatistics) -> Tensor:
    """How many tokens the experts of these routers' weights have seen."""
    sites = [moment.site for moment in routing if moment.site.of(0) == ROUTER_WEIGHT.of(0)]
    return torch.tensor([statistics.tokens(site) for site in sites])
