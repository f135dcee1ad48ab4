"""Products of activations, summed in float32 into a matrix that is there already.

To a matrix on another device, the host, they are added some rows at a time, so that it may be larger than theirs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

#: Rows of a Gram matrix that are computed at once: few, so that little of what symmetry gives is computed. So many rows
#: of any product go to the host at once.
TILE = 256


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add xᵀy to ``total``, (width of x, width of y), in place; x and y are (tokens, width)."""
    step = len(total) if total.device == x.device else TILE
    with as_exact_as_its(x):
        x, y = x.float(), y.float()
        for rows, columns in zip(total.split(step), x.split(step, dim=1), strict=True):
            _accumulate(rows, columns.mT, y)


def add_head_grams(total: Tensor, x: Tensor) -> None:
    """Add xᵢᵀxᵢ of every head's slice xᵢ of x, (tokens, heads * width), to ``total``, (heads, width, width), in place.

    Head by head: a product of all at once would copy x to bring each head's tokens together.
    """
    with as_exact_as_its(x):
        for gram, of_head in zip(total, x.float().chunk(len(total), dim=1), strict=True):
            _accumulate(gram, of_head.mT, of_head)


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀx to the upper triangle of ``total``, (width, width), in place, and some of it to the lower.

    Only what lies right of the diagonal's tiles is computed: nearly half the operations.
    """
    with as_exact_as_its(x):
        x = x.float()
        for start in range(0, len(total), TILE):
            rows = x[:, start : start + TILE]
            _accumulate(total[start : start + TILE, start:], rows.mT, x[:, start:])


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.device == left.device:
        total.addmm_(left, right)
    else:
        total.add_((left @ right).to(total.device))


def mirror(total: Tensor) -> Tensor:
    """The upper triangle of ``total`` copied to the lower, tile by tile in place."""
    for start in range(0, len(total), TILE):
        end = start + TILE
        total[end:, start:end] = total[start:end, end:].mT
    return total


@contextmanager
def as_exact_as_its(activations: Tensor) -> Iterator[None]:
    """While open, products of float32 are taken in the narrowest format that holds every bit of the activations.

    Of bfloat16 that is bfloat16 itself, which CPUs with matrix units multiply some times as fast and sum in float32 all
    the same; of float16 it is TF32, which GPUs have.
    """
    if activations.dtype.itemsize > 2:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if activations.dtype == torch.bfloat16 else "high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
