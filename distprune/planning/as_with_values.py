"""What torch would do otherwise where tensors have no values: choose the attention of a GPU that is only imagined, find
no eigenvectors where eigenvalues alone are asked for, route tokens to experts, and multiply them by the experts'
matrices, which takes as much as multiplying them all by one."""

from __future__ import annotations

from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.overrides import TorchFunctionMode

from distprune.planning.imagined_gpu import IMAGINED_GPU

aten = torch.ops.aten


class AsWithValues(TorchFunctionMode):
    """While it is entered, torch chooses the kernels that it would for tensors with values."""

    def __enter__(self):
        # It fails for the kind of device that the imagined GPU is of, where no casts are automatic.
        answers = is_autocast_enabled(torch.is_autocast_enabled)
        self._answering = mock.patch.object(torch, "is_autocast_enabled", answers)
        self._answering.start()
        return super().__enter__()

    def __exit__(self, *error):
        self._answering.stop()
        return super().__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.eigvalsh:
            return aten._linalg_eigh(*args, compute_v=False)[0]
        if function is F.scaled_dot_product_attention and args[0].device.type != "cpu":
            return attention(*args, **(kwargs or {}))
        if function is torch._grouped_mm:  # of bfloat16 alone torch tells the shape, and of none the operations
            return args[0] @ args[1][0]
        if function is torch.equal:  # asks whether tokens go where they went, or layers add what their parts give
            return True
        if function is torch.bincount:
            return even_counts(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def is_autocast_enabled(ask: Callable[..., bool]) -> Callable[..., bool]:
    """torch's own answer, or no for the imagined GPU."""
    return lambda *device: device != (IMAGINED_GPU.type,) and ask(*device)


def even_counts(numbers: Tensor, minlength: int) -> Tensor:
    """How often each number occurs, if all occur as often."""
    each, more = divmod(numbers.numel(), minlength)
    with unset_fake_temporarily():
        return torch.tensor([each + (number < more) for number in range(minlength)])


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
