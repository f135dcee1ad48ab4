"""A GPU where there is none: tensors that say they lie on it, while their values lie in ordinary memory.

What is computed there is computed on the CPU, so that results can be compared; and, as on a real GPU, no operation
takes tensors of both sides, except for copies and for numbers in ordinary memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _DummyPrivateUse1Hook,
    _setup_privateuseone_for_python_backend,
)

NAME = "pretend"
aten = torch.ops.aten
#: Results lie where the first tensor does, and others may lie elsewhere.
TAKE_BOTH = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}


class NotByDefault(_DummyPrivateUse1Hook):
    """Nobody but who names the device is to use it."""

    def is_available(self) -> bool:
        return False


class Module(_DummyBackendModule):
    """What PyTorch asks of a kind of device."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


# Before the first gradient, since autograd asks once what devices there are.
_setup_privateuseone_for_python_backend(NAME, backend_module=Module(), hook=NotByDefault())
GPU = torch.device(NAME, 0)


@contextmanager
def pretend_gpu() -> Iterator[torch.device]:
    """While open, tensors can be moved to the yielded device and be made there."""
    with Dispatch(), MakesThere():
        yield GPU


class OnGpu(Tensor):
    """A tensor that says it is there."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> OnGpu:
        layout = {"strides": values.stride(), "storage_offset": values.storage_offset(), "dtype": values.dtype}
        made = Tensor._make_wrapper_subclass(cls, values.size(), device=GPU, **layout)
        made.values = values
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})

    def tolist(self) -> Any:
        return self.values.tolist()


class Dispatch(TorchDispatchMode):
    """Sees operations without such tensors too, which may make the first."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


class MakesThere(TorchFunctionMode):
    """What is made of Python's numbers is made here and then moved: on its way there PyTorch would ask nobody."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor) and is_there(device):
            return function(*args, **kwargs | {"device": "cpu"}).to(device)
        return function(*args, **kwargs)


def is_there(value: Any) -> bool:
    """Of a tensor or a device."""
    device = value.device if isinstance(value, Tensor) else value
    return isinstance(device, torch.device) and device.type == NAME


def compute(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    leaves = tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    asked = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    there = [tensor for tensor in tensors if is_there(tensor)]
    here = [tensor for tensor in tensors if not is_there(tensor)]
    takes_both = function in TAKE_BOTH or asked
    if there and not takes_both and any(tensor.dim() for tensor in here):
        raise RuntimeError(f"{function}: tensors on {NAME} and on the CPU")
    goes_there = is_there(asked[0]) if asked else is_there(tensors[0]) if takes_both else bool(there)

    bare_args, bare_kwargs = tree_map(bare, (args, kwargs))
    if function is aten.mm.dtype:  # products of 16 bits summed in 32, which CPUs have no kernel for
        left, right, dtype = bare_args
        function, bare_args = aten.mm.default, (left.to(dtype), right.to(dtype))
    if function is aten.histc.default:  # of integers, likewise
        bare_args = (bare_args[0].float(), *bare_args[1:])
    result = function(*bare_args, **bare_kwargs)
    known = {id(bare(tensor)): tensor for tensor in tensors}

    def placed(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        given = known.get(id(value))
        if given is not None and is_there(given) == goes_there:
            return given
        values = value if given is None else value.clone()  # a move, which shares no memory
        return OnGpu(values) if goes_there else values

    return tree_map(placed, result)


def bare(value: Any) -> Any:
    if isinstance(value, OnGpu):
        return value.values
    return torch.device("cpu") if is_there(value) else value
