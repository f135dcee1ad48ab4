"""The second moments that methods ask for: each says what one micro-batch adds to its sum over tokens.

Row-vector convention: an activation X is (tokens, width), its Gram matrix XᵀX / T. Products are taken in float32 from
the activations' own dtype: a product of bfloat16 values is exact in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

Activations = Mapping[str, Tensor]


@dataclass(frozen=True)
class Mean:
    """E[x], (width,)."""

    tap: str

    def sum(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().sum(dim=0)


@dataclass(frozen=True)
class Power:
    """E[x²] of every channel, (width,)."""

    tap: str

    def sum(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().square().sum(dim=0)


@dataclass(frozen=True)
class Gram:
    """E[xᵀx], (width, width)."""

    tap: str

    def sum(self, activations: Activations) -> Tensor:
        x = activations[self.tap].float()
        return x.T @ x


@dataclass(frozen=True)
class Cross:
    """E[xᵀy], (width of x, width of y)."""

    tap: str
    other: str

    def sum(self, activations: Activations) -> Tensor:
        return activations[self.tap].float().T @ activations[self.other].float()


@dataclass(frozen=True)
class HeadGram:
    """E[xᵢᵀxᵢ] of every head's slice xᵢ, (heads, width per head, width per head)."""

    tap: str
    heads: int

    def sum(self, activations: Activations) -> Tensor:
        x = activations[self.tap].float().unflatten(1, (self.heads, -1)).transpose(0, 1)
        return x.mT @ x


Moment = Mean | Power | Gram | Cross | HeadGram
