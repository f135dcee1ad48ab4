"""What code that goes by its tensors' values does where they have none: in a plan, which counts operations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

T = TypeVar("T")
#: How often the code that runs now stands for running.
REPEATED: ContextVar[int] = ContextVar("REPEATED", default=1)


def has_values(tensor: Tensor) -> bool:
    """Whether a tensor is more than a shape, a dtype and a device."""
    return not isinstance(tensor, FakeTensor)


def rows_where(mask: Tensor, expected: int) -> Tensor:
    """The indices where ``mask``, (rows,), is true, ascending: the first ``expected`` ones if it has no values."""
    if has_values(mask):
        return mask.nonzero().squeeze(1)
    return torch.arange(expected, device=mask.device)


def until_converged(limit: int, expected: int, check_every: int, tensor: Tensor) -> Iterator[int]:
    """The numbers from 1 up to ``limit``, for a loop that ends earlier when it has converged.

    Without values there is nothing to converge: then one step stands for those of the ``expected`` ones that check
    nothing, and one for the others, whose numbers ``check_every`` divides.
    """
    if has_values(tensor):
        yield from range(1, limit + 1)
        return
    checks = expected // check_every
    for number, times in ((1, expected - checks), (check_every, checks)):
        before = REPEATED.set(times)
        yield number
        REPEATED.reset(before)


def for_each(count: int, do: Callable[[int], T], tensor: Tensor) -> list[T]:
    """What is done with each of ``count`` things that are alike, given their numbers.

    Where ``tensor`` has no values, the first one stands for all.
    """
    if has_values(tensor):
        return [do(number) for number in range(count)]
    before = REPEATED.set(count * REPEATED.get())
    try:
        return [do(0)] * count
    finally:
        REPEATED.reset(before)
