"""What torch does for a GPU in C++ before its operations are dispatched, done here where there is no GPU.

Tensors without values may be a GPU's on any machine, but for indexing and the choice of an attention kernel, which ask
CUDA itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class PretendedGpu(TorchFunctionMode):
    """While it is entered, tensors of a GPU can be indexed and attended to where there is none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if replaced := REPLACED.get(function):
            if isinstance(args[0], Tensor) and args[0].device.type != "cpu":
                return replaced(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def get_item(tensor: Tensor, index: Any) -> Tensor:
    view, indices = _sliced(tensor, index)
    return aten.index(view, indices) if indices else aten.alias(view)


def set_item(tensor: Tensor, index: Any, value: Any) -> None:
    view, indices = _sliced(tensor, index)
    if not isinstance(value, Tensor):
        value = torch.full((), value, dtype=tensor.dtype, device=tensor.device)
    if indices:
        aten.index_put_(view, indices, value.to(view.dtype))
    else:
        view.copy_(value)


def _sliced(tensor: Tensor, index: Any) -> tuple[Tensor, list[Tensor | None]]:
    """The view that an index's numbers and slices mean, and the tensors that index its dimensions."""
    parts = list(index) if isinstance(index, tuple) else [index]
    if not any(part is Ellipsis for part in parts):
        parts.append(Ellipsis)
    place = next(number for number, part in enumerate(parts) if part is Ellipsis)
    taken = sum(_dimensions(part) for part in parts if part is not Ellipsis)
    parts[place : place + 1] = [slice(None)] * (tensor.dim() - taken)
    dim, indices = 0, []
    for part in parts:
        if part is None:
            tensor = tensor.unsqueeze(dim)
        elif isinstance(part, slice):
            if part != slice(None):
                tensor = aten.slice(tensor, dim, part.start, part.stop, 1 if part.step is None else part.step)
        elif isinstance(part, (Tensor, list)):
            indices += [None] * (dim - len(indices))
            indices.append(torch.as_tensor(part, device=tensor.device))
            dim += _dimensions(part) - 1
        else:
            tensor = tensor.select(dim, int(part))
            continue
        dim += 1
    return tensor, indices


def _dimensions(part: Any) -> int:
    """How many dimensions a part of an index takes."""
    if part is None:
        return 0
    return part.dim() if isinstance(part, Tensor) and part.dtype == torch.bool else 1


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By the kernel that is fused and takes a mask where there is one."""
    if attn_mask is None and query.dtype.itemsize == 2:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)[0]
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    if attn_mask is not None:
        attn_mask = attn_mask.expand(*query.shape[:3], key.shape[2])
    found = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, query.requires_grad, dropout_p, is_causal, scale=scale
    )
    return found[0]


REPLACED: dict[Callable[..., Any], Callable[..., Any]] = {
    Tensor.__getitem__: get_item,
    Tensor.__setitem__: set_item,
    F.scaled_dot_product_attention: attention,
}
