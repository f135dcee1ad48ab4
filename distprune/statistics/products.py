"""Products of activations, summed in float32 into a matrix that is there already."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Rows of a Gram matrix that are computed at once: few, so that little of what symmetry gives is computed.
TILE = 256


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add xᵀy to ``total``, (.., width of x, width of y), in place; x and y are (.., tokens, width)."""
    with as_exact_as_its(x):
        if total.ndim == 2:
            total.addmm_(x.float().mT, y.float())
        else:
            total.baddbmm_(x.float().mT, y.float())


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀx to the upper triangle of ``total``, (width, width), in place, and some of it to the lower.

    Only what lies right of the diagonal's tiles is computed: nearly half the operations.
    """
    with as_exact_as_its(x):
        x = x.float()
        for start in range(0, len(total), TILE):
            rows = x[:, start : start + TILE]
            total[start : start + TILE, start:].addmm_(rows.mT, x[:, start:])


def mirror(total: Tensor) -> Tensor:
    """The upper triangle of ``total`` copied to the lower, tile by tile in place."""
    for start in range(0, len(total), TILE):
        end = start + TILE
        total[end:, start:end] = total[start:end, end:].mT
    return total


@contextmanager
def as_exact_as_its(activations: Tensor) -> Iterator[None]:
    """While open, GPUs take products in TF32 where that loses nothing: it holds every bit of a 16-bit number."""
    if activations.dtype.itemsize > 2:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
