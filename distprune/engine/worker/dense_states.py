"""How far a layer that is being pruned is from the dense model's hidden states."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from distprune.layers.parts import DecoderLayer
from distprune.layers.runner import LayerRunner, Observer
from distprune.layers.sites import (
    ATTENTION_ERROR,
    ATTENTION_OUTPUT,
    FFN_ERROR,
    FFN_OUTPUT,
    LAYER_INPUT,
    LAYER_OUTPUT,
    Site,
)

#: What is seen of a layer to tell its errors.
SEEN_FOR: Mapping[Site, set[Site]] = {ATTENTION_ERROR: {LAYER_INPUT, ATTENTION_OUTPUT}, FFN_ERROR: {LAYER_OUTPUT}}
#: Hidden states of 16 bits round away so much of what a part adds to them, at most, over its size.
ROUNDING = 0.1


@dataclass
class DenseStates:
    """The dense model's hidden states around one layer.

    Attributes:
        runner: of the layers.
        layer: the dense layer.
        index: which layer of the model it is.
        given: at the layer's input, (samples, length, d).
        output: at its output, (samples, length, d).
    """

    runner: LayerRunner
    layer: DecoderLayer
    index: int
    given: Tensor
    output: Tensor

    def observing(self, update: Observer, sites: Collection[Site]) -> tuple[Observer, set[Site]]:
        """An observer that shows ``update`` what a layer's errors are, and the sites at which it is to observe.

        It takes the micro-batches of one pass over the same samples in their order. Where the outputs of the parts are
        not simply added to the hidden states, as in families that normalize or scale them first, errors are zero: no
        change of an output projection by them would make up for them.

        Args:
            update: what is to see the activations at ``sites``.
            sites: those of errors among them.
        """
        errors = SEEN_FOR.keys() & set(sites)
        if not errors:
            return update, set(sites)
        seen = 0

        def observe(activations: dict[Site, Tensor]) -> None:
            nonlocal seen
            first = seen
            seen += len(next(iter(activations.values())))
            update(activations | {site: self._error(site, activations, slice(first, seen)) for site in errors})

        return observe, set(sites) - errors | set[Site]().union(*(SEEN_FOR[site] for site in errors))

    def _error(self, site: Site, activations: Mapping[Site, Tensor], tokens: slice) -> Tensor:
        own = sum_of(activations, SEEN_FOR[site])
        if not self.adds_outputs:
            return torch.zeros_like(own)
        wanted = self._after_attention if site == ATTENTION_ERROR else self.output.flatten(0, 1)
        return (wanted[tokens].to(own.device, torch.float32) - own.float()).to(own.dtype)

    @cached_property
    def _after_attention(self) -> Tensor:
        """The hidden states between attention and feed-forward network, (tokens, d)."""
        seen = self._see(self.given, SEEN_FOR[ATTENTION_ERROR])
        return torch.cat([sum_of(activations, activations).to(self.given.device) for activations in seen])

    @cached_property
    def adds_outputs(self) -> bool:
        """Whether the layer adds to its input what its parts give, and nothing else, seen on one micro-batch."""
        shape = self.layer.shape
        parts = [site for site, part in ((ATTENTION_OUTPUT, shape.attention), (FFN_OUTPUT, shape.ffn)) if part]
        batch = self.given[: self.runner.micro_batch]
        [activations] = self._see(batch, {LAYER_INPUT, LAYER_OUTPUT, *parts})
        added = activations[LAYER_OUTPUT].float() - activations[LAYER_INPUT].float()
        given = sum_of(activations, parts).float()
        is_near = (added - given).norm(dim=1) <= ROUNDING * given.norm(dim=1)
        of_most = is_near.float().mean() > 0.5
        return torch.equal(of_most, torch.ones_like(of_most))

    def _see(self, states: Tensor, sites: Collection[Site]) -> list[dict[Site, Tensor]]:
        """What every micro-batch gives at these sites of the dense layer."""
        seen: list[dict[Site, Tensor]] = []
        self.runner.observe(self.layer, self.index, states, lambda activations: seen.append({**activations}), sites)
        return seen


def sum_of(activations: Mapping[Site, Tensor], sites: Collection[Site]) -> Tensor:
    """The sum of the activations at some sites."""
    first, *others = (activations[site] for site in sorted(sites))
    for other in others:
        first = first + other
    return first
