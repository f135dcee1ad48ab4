"""Experts that are read a chunk at a time, so that a layer may have more of them than fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.layers.names import LayerNames
from distprune.layers.parts import Experts, keep_experts

#: Reads some experts' tensors by their names in the layer's module, given their numbers in the checkpoint, (n,).
ReadExperts = Callable[[Tensor], Mapping[str, Tensor]]


def in_chunks(count: int, at_once: int) -> list[range]:
    """Which of so many experts are read together."""
    return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]


@dataclass(frozen=True)
class ExpertChunks:
    """How the experts of a layer are read whose own tensors are elsewhere.

    Attributes:
        names: what its tensors are called.
        read: reads some experts.
        at_once: how many are read at once, except for the last. It fixes the order of sums, so it belongs to the run's
            configuration.
    """

    names: LayerNames
    read: ReadExperts
    at_once: int

    def of(self, experts: Experts) -> Iterator[tuple[range, Experts]]:
        """The mixture's experts chunk by chunk, each with its numbers in the mixture, and nothing that they share."""
        for own in self.numbers(experts.shape.count):
            yield own, self.take(experts, own)

    def numbers(self, count: int) -> list[range]:
        """Which experts are read together, of so many."""
        return in_chunks(count, self.at_once)

    def take(self, experts: Experts, own: range) -> Experts:
        """Some of the mixture's experts, read."""
        assert experts.elsewhere is not None
        numbers = experts.elsewhere[own.start : own.stop]
        chunk = keep_experts(experts, torch.tensor(own, device=experts.router.weight.device))
        return self.names.with_tensors(chunk, self.read(numbers))
