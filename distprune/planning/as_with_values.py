"""What torch would do otherwise where tensors have no values: choose the attention of a GPU that is only imagined, and
find no eigenvectors where eigenvalues alone are asked for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


class AsWithValues(TorchFunctionMode):
    """While it is entered, torch chooses the kernels that it would for tensors with values."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.eigvalsh:
            return aten._linalg_eigh(*args, compute_v=False)[0]
        if function is F.scaled_dot_product_attention and args[0].device.type != "cpu":
            return attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


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
