"""The moments that methods ask for: how large each is, and how it grows by one micro-batch.

Row-vector convention: an activation X is (tokens, width), its Gram matrix XᵀX / T. Products are summed in float32 from
the activations' own dtype: a product of bfloat16 values is exact in float32. Totals grow in place, so that of the
largest of them there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.statistics.products import add_gram, add_head_grams, add_product, mirror

Activations = Mapping[str, Tensor]
#: Tokens whose squares are summed at once on a CPU.
ROWS = 256


class Summed:
    """A moment that is a sum over tokens."""

    @staticmethod
    def average(total: Tensor, tokens: int) -> Tensor:
        return total.div_(tokens)


@dataclass(frozen=True)
class Mean(Summed):
    """E[x], (width,)."""

    tap: str

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.tap].shape[1:]

    def add(self, total: Tensor, activations: Activations) -> None:
        add(total, activations[self.tap].sum(dim=0, dtype=torch.float32))


@dataclass(frozen=True)
class Power(Summed):
    """E[x²] of every channel, (width,)."""

    tap: str

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.tap].shape[1:]

    def add(self, total: Tensor, activations: Activations) -> None:
        for rows in cached(activations[self.tap]):
            add(total, rows.to(torch.float32, copy=True).square_().sum(dim=0))


@dataclass(frozen=True)
class Gram(Summed):
    """E[xᵀx], (width, width)."""

    tap: str

    def size(self, activations: Activations) -> tuple[int, ...]:
        width = activations[self.tap].shape[1]
        return width, width

    def add(self, total: Tensor, activations: Activations) -> None:
        add_gram(total, activations[self.tap])

    @staticmethod
    def average(total: Tensor, tokens: int) -> Tensor:
        return mirror(total.div_(tokens))


@dataclass(frozen=True)
class Cross(Summed):
    """E[xᵀy], (width of x, width of y)."""

    tap: str
    other: str

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.tap].shape[1], activations[self.other].shape[1]

    def add(self, total: Tensor, activations: Activations) -> None:
        add_product(total, activations[self.tap], activations[self.other])


@dataclass(frozen=True)
class HeadGram(Summed):
    """E[xᵢᵀxᵢ] of every head's slice xᵢ, (heads, width per head, width per head)."""

    tap: str
    heads: int

    def size(self, activations: Activations) -> tuple[int, ...]:
        width = activations[self.tap].shape[1] // self.heads
        return self.heads, width, width

    def add(self, total: Tensor, activations: Activations) -> None:
        add_head_grams(total, activations[self.tap])


@dataclass(frozen=True)
class Peak:
    """max |x| of every channel, (width,)."""

    tap: str

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.tap].shape[1:]

    def add(self, total: Tensor, activations: Activations) -> None:
        torch.maximum(total, activations[self.tap].abs().amax(dim=0).float().to(total.device), out=total)

    @staticmethod
    def average(total: Tensor, tokens: int) -> Tensor:
        return total


@dataclass(frozen=True)
class ScalingPower(Summed):
    """E[s²] of how the loss changes, to first order, when a rotary pair is scaled, (groups, pairs).

    Of an activation x with gradient g, scaling some of its channels changes a token's loss by s = Σ x∘g over them. A
    KV group's pair p is the channels p and p + width/2 of all its heads.
    """

    tap: str
    other: str
    groups: int
    pairs: int

    def size(self, activations: Activations) -> tuple[int, ...]:
        return self.groups, self.pairs

    def add(self, total: Tensor, activations: Activations) -> None:
        for x, gradient in zip(cached(activations[self.tap]), cached(activations[self.other]), strict=True):
            products = x.float() * gradient.float()
            changes = products.unflatten(1, (self.groups, -1, 2, self.pairs)).sum(dim=(2, 3))
            add(total, changes.square_().sum(dim=0))


def cached(x: Tensor) -> tuple[Tensor, ...]:
    """x in parts of some rows, what is made of which stays in a CPU's cache; whole on a GPU, which has work for all."""
    return x.split(ROWS) if x.device.type == "cpu" else (x,)


def add(total: Tensor, values: Tensor) -> None:
    """Add to a total, on its device."""
    total.add_(values.to(total.device))


Moment = Mean | Power | Peak | Gram | Cross | HeadGram | ScalingPower


def taps_of(moments: Iterable[Moment]) -> set[str]:
    """The activations that the moments are of."""
    return {tap for moment in moments for tap in (moment.tap, getattr(moment, "other", moment.tap))}
