"""Seeing what passes through the experts of a mixture, each of which gets the tokens that are routed to it.

transformers runs all experts of a layer as one module, called with the tokens' hidden states, the experts that each
goes to and the router's weights, all sorted by expert inside. What goes into its gate and comes out is seen on the way,
and so are the gradients there and at the module's output; nothing is computed again but what an expert makes of its
neurons, where that is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from distprune.layers.sites import (
    EXPERT_GATE,
    EXPERT_INPUT,
    EXPERT_NEURONS,
    EXPERT_OUTPUT,
    EXPERT_UP,
    ROUTER_WEIGHT,
    Site,
)

Keep = Callable[[Site, Tensor], None]


@dataclass(frozen=True)
class Routing:
    """Where the tokens of one pass go, sorted by expert as the module sorts them.

    Attributes:
        hidden_states: at the module's input, (tokens, d).
        tokens: of each expert, which of them are routed to it.
        weights: of each expert, the router's weights of these, (routed, 1).
    """

    hidden_states: Tensor
    tokens: Sequence[Tensor]
    weights: Sequence[Tensor]

    @classmethod
    def of(cls, hidden_states: Tensor, chosen: Tensor, weights: Tensor, experts: int) -> Routing:
        """From what the module is called with: the experts of each token and their weights, (tokens, k)."""
        numbers, order = torch.sort(chosen.flatten())
        counts = torch.bincount(numbers, minlength=experts).tolist()
        tokens, sorted_weights = order // chosen.shape[1], weights.flatten()[order].unsqueeze(1)
        return cls(hidden_states, tokens.split(counts), sorted_weights.split(counts))

    def split(self, routed: Tensor) -> Sequence[Tensor]:
        """What belongs to each expert of something about every routed token, sorted by expert."""
        return routed.split([len(tokens) for tokens in self.tokens])


class ExpertPlaces:
    """The sites of a mixture's experts.

    Args:
        experts: the module with all of them, as transformers' ``grouped_mm`` runs it.
        sites: which to see, each of some expert.
        keep: is called with each site and what was seen there, at the tokens that were routed to the expert.
    """

    def __init__(self, experts: nn.Module, sites: Collection[Site], keep: Keep):
        self._experts: Any = experts  # whose attributes torch takes for tensors or modules
        self._sites, self._keep = sites, keep
        self._routing: Routing | None = None

    def watch(self) -> Iterator[RemovableHandle | Undo]:
        """See every pass until the handles are removed."""
        yield self._experts.register_forward_pre_hook(self._see_input, with_kwargs=True)
        yield self._experts.register_forward_hook(self._see_output)
        if not self._experts.has_gate:
            yield self._experts.act_fn.register_forward_pre_hook(lambda _, given: self._see_projected(given[0]))
            yield self._experts.act_fn.register_forward_hook(lambda _, __, neurons: self._see_neurons(neurons))
            return
        gated = self._experts._apply_gate

        def apply_gate(projected: Tensor) -> Tensor:
            self._see_projected(projected)
            neurons = gated(projected)
            self._see_neurons(neurons)
            return neurons

        self._experts._apply_gate = apply_gate
        yield Undo(lambda: delattr(self._experts, "_apply_gate"))

    # ---------------------------------------------------------------- what is seen, in the order of a pass

    def _see_input(self, _: nn.Module, given: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        hidden_states, chosen, weights = (tensor.detach() for tensor in (*given, *named.values()))
        self._routing = routing = Routing.of(hidden_states, chosen, weights, self._experts.num_experts)
        for site, expert in self._of(EXPERT_INPUT):
            self._keep(site, hidden_states[routing.tokens[expert]])

    def _see_projected(self, projected: Tensor) -> None:
        """What gate and up projections give, (routed, 2f), or the latter alone."""

        def see(values: Tensor, *, gradient: bool) -> None:
            by_expert = self._routed.split(values)
            for place, number in ((EXPERT_UP, -1), (EXPERT_GATE, 0)):
                for site, expert in self._of(place.gradient if gradient else place):
                    self._keep(site, self._projections(by_expert[expert])[number])

        see(projected.detach(), gradient=False)
        if any(self._of(EXPERT_GATE.gradient)) or any(self._of(EXPERT_UP.gradient)):
            projected.register_hook(lambda gradient: see(gradient, gradient=True))

    def _see_neurons(self, neurons: Tensor) -> None:
        """``neurons`` are (routed, f)."""
        own = self._routed.split(neurons.detach())
        for site, expert in self._of(ROUTER_WEIGHT):
            self._keep(site, self._weight(expert, neurons))
        for site, expert in self._of(EXPERT_NEURONS):
            self._keep(site, own[expert] * self._weight(expert, neurons))
        for site, expert in self._of(EXPERT_OUTPUT):
            self._keep(site, self._output(expert, own[expert]) * self._weight(expert, neurons))

    def _see_output(self, _: nn.Module, __: object, output: Tensor) -> None:
        """What all experts give together: its gradient is each one's at its tokens, the router's weight included."""
        if not any(self._of(EXPERT_OUTPUT.gradient)):
            return

        def see(gradient: Tensor) -> None:
            for site, expert in self._of(EXPERT_OUTPUT.gradient):
                self._keep(site, gradient[self._routed.tokens[expert]])

        output.register_hook(see)

    # ----------------------------------------------------------------

    @property
    def _routed(self) -> Routing:
        assert self._routing is not None
        return self._routing

    def _of(self, place: Site) -> list[tuple[Site, int]]:
        """The sites that are this place in some expert, and which."""
        return [
            (site, site.expert) for site in self._sites if site.expert is not None and site == place.of(site.expert)
        ]

    def _weight(self, expert: int, like: Tensor) -> Tensor:
        return self._routed.weights[expert].to(like.dtype)

    def _projections(self, projected: Tensor) -> Sequence[Tensor]:
        """Gate and up, or up alone, of what lies as the module's own rows do."""
        if not self._experts.has_gate:
            return (projected,)
        if self._experts.is_concatenated:
            return projected.chunk(2, dim=1)
        return projected[:, 0::2], projected[:, 1::2]

    def _output(self, expert: int, neurons: Tensor) -> Tensor:
        down = self._experts.down_proj[expert]
        output = neurons @ (down if self._experts.is_transposed else down.mT)
        return output + self._experts.down_proj_bias[expert] if self._experts.has_bias else output


class Undo:
    """A handle like those of hooks."""

    def __init__(self, remove: Callable[[], None]):
        self.remove = remove
