"""Mixtures of experts: what the loss would lose by whole experts and by neurons of each, and what is left of them.

A token's output is the sum of a few experts' outputs, each times the router's weight r. So expert e is a feed-forward
network of the neurons r·a at the tokens that are routed to it, and everything said of one network holds of it with the
second moment E[r² aᵀa], taken over all tokens. One metric C = E[gᵀg] of the layer's output serves all experts. HEAPr
(arXiv 2509.22299) is the special case in which neurons are ranked by their own costs and nothing makes up for them.
"""

from __future__ import annotations

from math import ceil

import torch
from torch import Tensor

from distprune.layers.parts import Experts
from distprune.layers.shapes import ExpertsShape
from distprune.layers.sites import EXPERT_NEURONS, FFN_OUTPUT, SHARED_NEURONS
from distprune.methods.base import Profile, ProfileExperts
from distprune.methods.curvature.curves import metric_root
from distprune.solvers import elimination_path, for_each
from distprune.statistics import Gram, LayerStatistics, Moment, Power

#: At so many widths the cost of an expert is computed.
STEPS = 32
#: What an expert's neurons are like is taken from so many tokens besides its own, at each of which they are
#: independent and as large as the layer's experts' are on average.
PRIOR_TOKENS = 16


def expert_moments(shape: ExpertsShape) -> list[Moment]:
    """The second moments of every expert's neurons."""
    return [Gram(EXPERT_NEURONS.of(number)) for number in range(shape.count)]


def shared_moments(shape: ExpertsShape) -> list[Moment]:
    """The second moments of the neurons of the shared network, if there is one."""
    return [Gram(SHARED_NEURONS)] if shape.shared else []


def power_moments(shape: ExpertsShape) -> list[Moment]:
    """What :func:`typical_power` needs."""
    return [Power(EXPERT_NEURONS.of(number)) for number in range(shape.count)]


def expert_profiler(experts: Experts, statistics: LayerStatistics, damping: float) -> ProfileExperts:
    """What tells of some experts what it costs to narrow them, and to do without them.

    It gives expert_orders (E, f): the neurons of each, those that are missed least first; and expert_costs
    (E, steps + 1): of keeping so many of them as :func:`path_widths` says, the last of none, which is taken for what
    it costs to do without the expert.
    """
    tokens = statistics.tokens(FFN_OUTPUT.gradient)
    root = metric_root(statistics.gram(FFN_OUTPUT.gradient), damping)
    typical = typical_power(experts.shape, statistics)

    def profile(some: Experts, numbers: range, statistics: LayerStatistics) -> Profile:
        def path_of(place: int) -> tuple[Tensor, Tensor]:
            site = EXPERT_NEURONS.of(numbers[place])
            seen = statistics.tokens(site)
            gram = statistics.gram(site) * (seen / (seen + PRIOR_TOKENS))
            gram.diagonal().add_(typical * PRIOR_TOKENS / (seen + PRIOR_TOKENS))
            return path(some.down[place], root, gram * (seen / tokens), damping, STEPS)

        orders, errors = zip(*for_each(len(numbers), path_of, root), strict=True)
        return {"expert_orders": torch.stack(orders), "expert_costs": torch.stack(errors) / 2}

    return profile


def mixture_curves(experts: Experts, statistics: LayerStatistics, damping: float) -> Profile:
    """What is not of single experts.

    Returns:
        - expert_widths (steps + 1,): falling, from all neurons of an expert to none;
        - shared_order (s,), shared_widths, shared_costs: the neurons of the shared network, if there is one, and what
          it costs to keep so many.
    """
    profile = {"expert_widths": path_widths(experts.shape.width)}
    if experts.shared is None:
        return profile
    root = metric_root(statistics.gram(FFN_OUTPUT.gradient), damping)
    order, errors = path(experts.shared.down.weight, root, statistics.gram(SHARED_NEURONS), damping, STEPS)
    return profile | {"shared_order": order, "shared_widths": path_widths(len(order)), "shared_costs": errors / 2}


def path_widths(width: int) -> Tensor:
    """How many neurons are left after each step of :func:`path`, from all to none."""
    step = ceil(width / STEPS)
    return torch.tensor([*range(width, 0, -step), 0])


def path(down: Tensor, root: Tensor, gram: Tensor, damping: float, steps: int) -> tuple[Tensor, Tensor]:
    """The order in which a down projection (d, f) loses its inputs, and the errors in the metric's root."""
    weight = (root.mT @ down.double()).float()
    return elimination_path(weight, gram, damping, batch=ceil(weight.shape[1] / steps))


def typical_power(shape: ExpertsShape, statistics: LayerStatistics) -> Tensor:
    """The mean square of a neuron of the layer's experts, over all tokens that they see, ()."""
    sites = [moment.site for moment in power_moments(shape)]
    powers = [statistics.power(site).mean() * statistics.tokens(site) for site in sites]
    return torch.stack(powers).sum() / max(1, sum(statistics.tokens(site) for site in sites))
