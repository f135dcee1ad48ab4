"""Modules that are made without weights: their parameters are on the meta device, their buffers are real."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

#: Numbers from which on memory is not even asked for. Buffers are far smaller, and experts of a layer are many times as
#: many, which a machine may refuse.
LARGE = 2**24


class LargeOnMeta(TorchFunctionMode):
    """While it is entered, large tensors that have no values yet are made on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.empty and "size" not in kwargs:
            size = args[0] if isinstance(args[0], tuple | list | torch.Size) else args
            if prod(size) >= LARGE:
                kwargs = kwargs | {"device": "meta"}
        return function(*args, **kwargs)


@contextmanager
def empty_weights() -> Iterator[None]:
    """Inside, every parameter that a module gets goes to the meta device, also one that never had values."""
    register = nn.Module.register_parameter

    def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
    try:
        with LargeOnMeta():
            yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
