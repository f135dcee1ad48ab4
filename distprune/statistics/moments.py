"""The moments that methods ask for: how large each is, and how it grows by one micro-batch.

Row-vector convention: an activation X is (tokens, width), its Gram matrix XᵀX / T, where T counts the tokens that its
own site has seen. Products are summed in float32 from the activations' own dtype: a product of bfloat16 values is exact
in float32. Totals grow in place, so that of the largest of them there is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from distprune.layers.sites import Site
from distprune.statistics.products import add_gram, add_head_grams, add_product, mirror

Activations = Mapping[Site, Tensor]
#: Tokens whose squares are summed at once on a CPU.
ROWS = 256


class Moment:
    """What is collected of the activations at a site, or at two that see the same tokens."""

    site: Site

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites whose activations it is of."""
        return (self.site,)

    def size(self, activations: Activations) -> tuple[int, ...]:
        """The dimensions of its total."""
        raise NotImplementedError

    def add(self, total: Tensor, activations: Activations) -> None:
        """Add one micro-batch, of at least one token, to the total in place."""
        raise NotImplementedError

    def average(self, total: Tensor, tokens: int) -> Tensor:
        """What the total over so many tokens comes to, in its place; zeros where there were none."""
        return total.div_(max(1, tokens))

    def moved(self, places: Mapping[Site, Site]) -> Moment:
        """The same moment where some sites, and the gradients there, are other ones."""
        own: Any = self  # a dataclass, as all of them are
        return replace(own, **{each.name: moved(getattr(own, each.name), places) for each in fields(own)})

    def unseen(self, average: Tensor) -> Tensor:
        """What to take it for, of the size of ``average``, where there were no tokens: as if all channels were of
        unit power and uncorrelated, so that what is weighed by it is weighed by its weights alone."""
        return average

    def __str__(self) -> str:
        """Its name in files: "Gram(ffn.neurons)"."""
        return f"{type(self).__name__}({', '.join(map(str, vars(self).values()))})"


@dataclass(frozen=True)
class Mean(Moment):
    """E[x], (width,)."""

    site: Site

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.site].shape[1:]

    def add(self, total: Tensor, activations: Activations) -> None:
        add(total, activations[self.site].sum(dim=0, dtype=torch.float32))


@dataclass(frozen=True)
class Power(Moment):
    """E[x²] of every channel, (width,)."""

    site: Site

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.site].shape[1:]

    def add(self, total: Tensor, activations: Activations) -> None:
        for rows in cached(activations[self.site]):
            add(total, rows.to(torch.float32, copy=True).square_().sum(dim=0))

    def unseen(self, average: Tensor) -> Tensor:
        return torch.ones_like(average)


@dataclass(frozen=True)
class Gram(Moment):
    """E[xᵀx], (width, width)."""

    site: Site

    def size(self, activations: Activations) -> tuple[int, ...]:
        width = activations[self.site].shape[1]
        return width, width

    def add(self, total: Tensor, activations: Activations) -> None:
        add_gram(total, activations[self.site])

    def average(self, total: Tensor, tokens: int) -> Tensor:
        return mirror(super().average(total, tokens))

    def unseen(self, average: Tensor) -> Tensor:
        return torch.eye(len(average), dtype=average.dtype, device=average.device)


@dataclass(frozen=True)
class Cross(Moment):
    """E[xᵀy], (width of x, width of y)."""

    site: Site
    other: Site

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.site, self.other

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.site].shape[1], activations[self.other].shape[1]

    def add(self, total: Tensor, activations: Activations) -> None:
        add_product(total, activations[self.site], activations[self.other])

    def unseen(self, average: Tensor) -> Tensor:
        return torch.ones_like(average)


@dataclass(frozen=True)
class HeadGram(Moment):
    """E[xᵢᵀxᵢ] of every head's slice xᵢ, (heads, width per head, width per head)."""

    site: Site
    heads: int

    def size(self, activations: Activations) -> tuple[int, ...]:
        width = activations[self.site].shape[1] // self.heads
        return self.heads, width, width

    def add(self, total: Tensor, activations: Activations) -> None:
        add_head_grams(total, activations[self.site])


@dataclass(frozen=True)
class Peak(Moment):
    """max |x| of every channel, (width,)."""

    site: Site

    def size(self, activations: Activations) -> tuple[int, ...]:
        return activations[self.site].shape[1:]

    def add(self, total: Tensor, activations: Activations) -> None:
        torch.maximum(total, activations[self.site].abs().amax(dim=0).float().to(total.device), out=total)

    def average(self, total: Tensor, tokens: int) -> Tensor:
        return total

    def unseen(self, average: Tensor) -> Tensor:
        return torch.ones_like(average)


@dataclass(frozen=True)
class MeanNorm(Moment):
    """E[‖x‖], ()."""

    site: Site

    def size(self, activations: Activations) -> tuple[int, ...]:
        return ()

    def add(self, total: Tensor, activations: Activations) -> None:
        add(total, torch.linalg.vector_norm(activations[self.site], dim=1, dtype=torch.float32).sum())


@dataclass(frozen=True)
class ScalingPower(Moment):
    """E[s²] of how the loss changes, to first order, when a rotary pair is scaled, (groups, pairs).

    Of an activation x with gradient g, scaling some of its channels changes a token's loss by s = Σ x∘g over them. A
    KV group's pair p is the channels p and p + width/2 of all its heads.
    """

    site: Site
    other: Site
    groups: int
    pairs: int

    @property
    def sites(self) -> tuple[Site, ...]:
        return self.site, self.other

    def size(self, activations: Activations) -> tuple[int, ...]:
        return self.groups, self.pairs

    def add(self, total: Tensor, activations: Activations) -> None:
        for x, gradient in zip(cached(activations[self.site]), cached(activations[self.other]), strict=True):
            products = x.float() * gradient.float()
            changes = products.unflatten(1, (self.groups, -1, 2, self.pairs)).sum(dim=(2, 3))
            add(total, changes.square_().sum(dim=0))


def cached(x: Tensor) -> tuple[Tensor, ...]:
    """x in parts of some rows, what is made of which stays in a CPU's cache; whole on a GPU, which has work for all."""
    return x.split(ROWS) if x.device.type == "cpu" else (x,)


def add(total: Tensor, values: Tensor) -> None:
    """Add to a total, on its device."""
    total.add_(values.to(total.device))


def sites_of(moments: Iterable[Moment]) -> set[Site]:
    """The sites whose activations the moments are of."""
    return {site for moment in moments for site in moment.sites}


def moved(value: object, places: Mapping[Site, Site]) -> object:
    """A moment's site, or the gradient there, as the one that stands in its place; any other value as it is."""
    if not isinstance(value, Site):
        return value
    place = places.get(replace(value, is_gradient=False), value)
    return place.gradient if value.is_gradient else place
