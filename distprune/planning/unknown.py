"""What code is told that asks for values where there are none, so that it goes the way that it usually goes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
#: A text has about so many times the root of its length of different tokens.
HEAPS = 30


def known_without_values(function: Any, args: tuple) -> bool | int | float | None:
    """What a tensor of one number is taken to hold: true, one, or as an integer its place in its tensor, since those
    are indices; None where something else is asked."""
    if function is not aten._local_scalar_dense.default:
        return None
    tensor = args[0]
    if tensor.dtype == torch.bool:
        return True
    return 1.0 if tensor.dtype.is_floating_point else tensor.storage_offset()


def distinct(function: Any, args: tuple) -> tuple[Tensor, Tensor, Tensor] | None:
    """The different values of a tensor of token ids, as many as a text of that length has by Heaps's law; None where
    something else is asked."""
    if function is not aten._unique2.default:
        return None
    flat = args[0].flatten()
    flat = flat[: round(HEAPS * len(flat) ** 0.5)]
    return flat, torch.empty_like(args[0], dtype=torch.long), torch.empty_like(flat, dtype=torch.long)


def without_masks(function: Any, args: tuple) -> tuple:
    """The arguments of an operation, all rows being meant where a mask would say which."""
    if function.overloadpacket not in (aten.index, aten.index_put, aten.index_put_):
        return args
    tensor, indices, *others = args
    return tensor, [_all_rows(tensor, place, index) for place, index in enumerate(indices)], *others


def _all_rows(tensor: Tensor, place: int, index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype != torch.bool:
        return index
    return torch.arange(tensor.shape[place], device=index.device)
