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
#: The same on a GPU, where products of fewer rows don't keep the GPU busy.
GPU_TILE = 2048


def add_product(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add xᵀy to ``total``, (width of x, width of y), in place; x and y are (tokens, width)."""
    step = len(total) if total.device == x.device else tile_on(x.device.type)
    with as_exact_as_its(x):
        x, y = operand(x), operand(y)
        for rows, columns in zip(total.split(step), x.split(step, dim=1), strict=True):
            _accumulate(rows, columns.mT, y)


def add_head_grams(total: Tensor, x: Tensor) -> None:
    """Add xᵢᵀxᵢ of every head's slice xᵢ of x, (tokens, heads * width), to ``total``, (heads, width, width), in place.

    Head by head: a product of all at once would copy x to bring each head's tokens together.
    """
    with as_exact_as_its(x):
        for gram, of_head in zip(total, operand(x).chunk(len(total), dim=1), strict=True):
            _accumulate(gram, of_head.mT, of_head)


def add_gram(total: Tensor, x: Tensor) -> None:
    """Add xᵀx to the upper triangle of ``total``, (width, width), in place, and some of it to the lower.

    Only what lies right of the diagonal's tiles is computed: nearly half the operations.
    """
    tile = tile_on(x.device.type)
    with as_exact_as_its(x):
        x = operand(x)
        for start in range(0, len(total), tile):
            rows = x[:, start : start + tile]
            _accumulate(total[start : start + tile, start:], rows.mT, x[:, start:])


def tile_on(device: str) -> int:
    """Rows of a Gram matrix that are computed at once on a kind of device."""
    return TILE if device == "cpu" else GPU_TILE


def operand(x: Tensor) -> Tensor:
    """Activations as products take them: in their own 16 bits on a GPU, else in float32."""
    return x if x.device.type != "cpu" and x.dtype.itemsize == 2 else x.float()


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype != torch.float32:  # multiplied exactly, and summed in float32
        total.add_(torch.mm(left, right, out_dtype=torch.float32).to(total.device))
    elif total.device == left.device:
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
    the same.
    """
    if activations.dtype != torch.bfloat16:
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
