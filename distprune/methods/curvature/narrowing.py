"""What pruning leaves of a mixture of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from distprune.layers.parts import Experts, FeedForward, Linear
from distprune.layers.shapes import ExpertsShape
from distprune.layers.sites import EXPERT_NEURONS
from distprune.methods.base import Profile
from distprune.methods.curvature.mixture_menus import kept_experts
from distprune.methods.mixtures import keep_experts, with_each
from distprune.methods.units import keep_neurons
from distprune.solvers import for_each
from distprune.statistics import LayerStatistics

Refit = Callable[..., Linear]


def without_experts(experts: Experts, planned: ExpertsShape, profile: Profile) -> tuple[Experts, Tensor]:
    """The mixture with as many whole experts as planned, and their numbers."""
    numbers = kept_experts(profile, planned.count, planned.groups)
    return (experts if planned.count == experts.shape.count else keep_experts(experts, numbers)), numbers


def narrowed(
    experts: Experts, own: range, width: int, orders: Tensor, statistics: LayerStatistics, refit: Refit
) -> Experts:
    """Experts of some width, each refitted to what it gave at the tokens routed to it.

    Args:
        own: their numbers in the layer.
        orders: of each of them, its neurons, those that are missed least first, (E, f).
        refit: of a projection, the inputs that it keeps, the second moment of all, and ``caution``: how many times
            the usual penalty there is on moving a weight.
    """

    def narrow(place: int) -> FeedForward:
        network, site = experts.expert(place), EXPERT_NEURONS.of(own[place])
        kept = orders[place, experts.shape.width - width :].sort().values
        # A moment of few tokens tells less than there is to tell.
        caution = 1 + experts.shape.width / max(1, statistics.tokens(site))
        down = refit(network.down, kept, statistics.gram(site), caution=caution)
        return replace(keep_neurons(network, kept), down=down)

    return with_each(experts, for_each(len(own), narrow, experts.down))
