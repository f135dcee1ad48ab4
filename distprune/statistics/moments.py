"""The moments that methods ask for: each measures one micro-batch, and says how two
measurements become one.

Row-vector convention: an activation X is (tokens, width), its Gram matrix XᵀX / T. Products are taken in float32 from
the activations' own dtype: a product of bfloat16 values is exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Activations = Mapping[str, Tensor]


class Summed:
    """A moment that is a sum over tokens."""

    @staticmethod
    def merge(total: Tensor, batch: Tensor) -> Tensor:
        return total.add_(batch)


@dataclass(frozen=True)
class Mean(Summed):
    """E[x], (width,)."""

    tap: str

    def measure(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().sum(dim=0)


@dataclass(frozen=True)
class Power(Summed):
    """E[x²] of every channel, (width,)."""

    tap: str

    def measure(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().square().sum(dim=0)


@dataclass(frozen=True)
class Gram(Summed):
    """E[xᵀx], (width, width)."""

    tap: str

    def measure(self, activations: Activations) -> Tensor:
        x = activations[self.tap].float()
        return x.T @ x


@dataclass(frozen=True)
class Cross(Summed):
    """E[xᵀy], (width of x, width of y)."""

    tap: str
    other: str

    def measure(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().T @ activations[self.other].float()


@dataclass(frozen=True)
class HeadGram(Summed):
    """E[xᵢᵀxᵢ] of every head's slice xᵢ, (heads, width per head, width per head)."""

    tap: str
    heads: int

    def measure(self, activations: Activations) -> Tensor:
        x = activations[self.tap].float().unflatten(1, (self.heads, -1)).transpose(0, 1)
        return x.mT @ x


@dataclass(frozen=True)
class Peak:
    """max |x| of every channel, (width,)."""

    tap: str

    def measure(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().abs().amax(dim=0)

    @staticmethod
    def merge(total: Tensor, batch: Tensor) -> Tensor:
        return total.maximum(batch)


Moment = Mean | Power | Peak | Gram | Cross | HeadGram
