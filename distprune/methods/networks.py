"""The feed-forward networks of a layer: its own one, or all those of its mixture, to each of which a method does alike.

A method is written for a :class:`~distprune.layers.parts.FeedForward`. An expert is one too, and what was seen of it
is shown to the method as if it had been seen at the sites of a layer's own network: NEURONS are the expert's neurons,
times the router's weights, at the tokens that were routed to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distprune.layers.parts import Attention, DecoderLayer, Experts, FeedForward
from distprune.layers.shapes import ExpertsShape, FeedForwardShape
from distprune.layers.sites import (
    EXPERT_GATE,
    EXPERT_INPUT,
    EXPERT_NEURONS,
    EXPERT_OUTPUT,
    EXPERT_UP,
    FFN_OUTPUT,
    GATE,
    NEURONS,
    SHARED_GATE,
    SHARED_NEURONS,
    SHARED_OUTPUT,
    SHARED_UP,
    UP,
    Site,
)
from distprune.layers.sites import FFN_INPUT as INPUT
from distprune.methods.mixtures import with_each
from distprune.solvers import for_each
from distprune.statistics import LayerStatistics, Moment

if TYPE_CHECKING:
    from distprune.methods.base import LayerToPrune, Profile

#: The sites that stand in the place of those of a layer's own network.
Places = Mapping[Site, Site]
SHARED: Places = {GATE: SHARED_GATE, UP: SHARED_UP, NEURONS: SHARED_NEURONS, FFN_OUTPUT: SHARED_OUTPUT}
#: What stands before the names of what a profile holds of each network of a mixture: of all experts, and of the shared.
OF_EXPERTS, OF_SHARED = "experts.", "shared."


def places_of_expert(number: int) -> Places:
    sites = {INPUT: EXPERT_INPUT, GATE: EXPERT_GATE, UP: EXPERT_UP, NEURONS: EXPERT_NEURONS, FFN_OUTPUT: EXPERT_OUTPUT}
    return {site: place.of(number) for site, place in sites.items()}


def moments_of_each(shape: FeedForwardShape | ExpertsShape | None, moments: Iterable[Moment]) -> Iterator[Moment]:
    """The moments of each network that a layer has, given those of a layer's own."""
    if isinstance(shape, FeedForwardShape):
        yield from moments
    elif shape is not None:
        moments = list(moments)
        shared = [SHARED] if shape.shared else []
        for places in [*map(places_of_expert, range(shape.count)), *shared]:
            yield from (moment.moved(places) for moment in moments)


def each_network(
    ffn: FeedForward | Experts, statistics: LayerStatistics
) -> Iterator[tuple[FeedForward, LayerStatistics]]:
    """The layer's own network, or all experts and then what is shared, each with what was seen of it."""
    if isinstance(ffn, FeedForward):
        yield ffn, statistics
        return
    for number in range(ffn.shape.count):
        yield ffn.expert(number), statistics.moved(places_of_expert(number))
    if ffn.shared is not None:
        yield ffn.shared, statistics.moved(SHARED)


def profile_each(
    ffn: FeedForward | Experts,
    statistics: LayerStatistics,
    profile: Callable[[FeedForward, LayerStatistics], Profile],
) -> dict[str, Tensor]:
    """A profile of every network that holds one number a neuron under each name, (f,).

    Experts keep as many neurons each, so under the same name a mixture's has what the neurons of each rank are worth
    together, ascending, (f,): the mean over the experts, each counting as many tokens as it saw. :func:`prune_each`
    gives the expert's own numbers back.
    """
    if isinstance(ffn, FeedForward):
        return dict(profile(ffn, statistics))
    seen = [statistics.moved(places_of_expert(number)) for number in range(ffn.shape.count)]
    experts = for_each(len(seen), lambda number: profile(ffn.expert(number), seen[number]), ffn.down)
    shared = [] if ffn.shared is None else [profile(ffn.shared, statistics.moved(SHARED))]
    weights = torch.tensor([own.tokens(NEURONS) for own in seen], dtype=torch.float32)
    weights = weights / weights.sum() if weights.any() else torch.full_like(weights, 1 / len(weights))
    profiles: dict[str, Tensor] = {}
    for name in experts[0]:
        stacked = torch.stack([own[name] for own in experts])
        profiles[name] = weights.to(stacked) @ stacked.sort(dim=1).values
        profiles[OF_EXPERTS + name] = stacked
    return profiles | {OF_SHARED + name: values for own in shared for name, values in own.items()}


def prune_each(
    given: LayerToPrune, attention: Attention | None, prune: Callable[[LayerToPrune], FeedForward]
) -> DecoderLayer:
    """The layer with what becomes of its attention, and of its feed-forward network or mixture, every network of which
    ``prune`` prunes.

    It is given a layer that has the one network, to which planned shape, statistics and profile belong, and is not
    called for one that is to stay as it is.
    """
    if given.layer.ffn is None or given.planned.ffn == given.layer.ffn.shape:
        return replace(given.layer, attention=attention)

    def pruned(own: LayerToPrune) -> FeedForward:
        return own.layer.ffn if own.planned.ffn == own.layer.ffn.shape else prune(own)

    return change_each(given, attention, pruned)


def change_each(
    given: LayerToPrune, attention: Attention | None, change_network: Callable[[LayerToPrune], FeedForward]
) -> DecoderLayer:
    """The same, where ``change_network`` is called for every network, also for one that keeps its shape."""
    ffn, planned, layer = given.layer.ffn, given.planned.ffn, replace(given.layer, attention=attention)
    if ffn is None:
        return layer
    if isinstance(ffn, FeedForward):
        return replace(layer, ffn=change_network(given))
    assert isinstance(planned, ExpertsShape)

    def changed_network(
        network: FeedForward, width: int, statistics: LayerStatistics, places: Places, profile: Profile
    ) -> FeedForward:
        return change_network(
            replace(
                given,
                layer=replace(given.layer, ffn=network),
                planned=replace(given.planned, ffn=replace(network.shape, width=width)),
                statistics=statistics.moved(places),
                profile=profile,
            )
        )

    profiles = profile_under(OF_EXPERTS, given.profile)

    def change(experts: Experts, own: range, statistics: LayerStatistics) -> Experts:
        def changed(place: int) -> FeedForward:
            number = own[place]
            profile = {name: tensor[number] for name, tensor in profiles.items()}
            return changed_network(experts.expert(place), planned.width, statistics, places_of_expert(number), profile)

        return with_each(experts, for_each(len(own), changed, experts.down))

    layer, _ = given.change_experts(layer, None, change)
    if ffn.shared is None:
        return layer
    profile = profile_under(OF_SHARED, given.profile)
    shared = changed_network(ffn.shared, planned.shared.width, given.statistics, SHARED, profile)
    return replace(layer, ffn=replace(layer.ffn, shared=shared))


def profile_under(prefix: str, profile: Profile) -> dict[str, Tensor]:
    """What a profile holds under names that begin so."""
    return {name.removeprefix(prefix): tensor for name, tensor in profile.items() if name.startswith(prefix)}
