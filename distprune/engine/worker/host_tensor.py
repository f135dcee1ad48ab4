"""Tensors through Ray's object store: as numpy arrays they are read from shared memory without a copy."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import numpy as np
import ray
import torch
from ray import ObjectRef
from ray.exceptions import OutOfDiskError, RayTaskError
from torch import Tensor

from distprune.errors import InputError, RunFailed, StorageFailed

# Bytes of an argument that no cluster calls large.
SMALL = 500


@dataclass(frozen=True)
class HostTensor:
    """A CPU tensor as a numpy array; numpy has no bfloat16, so 16-bit floats travel as their bits."""

    array: np.ndarray
    dtype: torch.dtype


def pack(tensor: Tensor) -> HostTensor:
    tensor = tensor.detach().contiguous().cpu()
    bits = tensor.view(torch.int16) if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
    return HostTensor(bits.numpy(), tensor.dtype)


def unpack(packed: HostTensor) -> Tensor:
    """The tensor, sharing its memory, which is read-only when it came through the object store."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(packed.array).view(packed.dtype)


def joined(packed: Sequence[HostTensor]) -> HostTensor:
    """Tensors of one dtype, one after the other along their first dimension."""
    return HostTensor(np.concatenate([each.array for each in packed]), packed[0].dtype)


def pack_all(value: Any) -> Any:
    """The same value with every tensor in it packed, in dicts, tuples and dataclasses such as decoder layers."""
    return map_leaves(value, Tensor, pack)


def unpack_all(value: Any) -> Any:
    """The inverse of :func:`pack_all`."""
    return map_leaves(value, HostTensor, unpack)


def map_leaves(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A value with everything of a kind in it changed."""
    if isinstance(value, kind):
        return change(value)
    if isinstance(value, Mapping):
        return {name: map_leaves(each, kind, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_leaves(each, kind, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{own.name: map_leaves(getattr(value, own.name), kind, change) for own in fields(value)})
    return value


def fetch(result: ObjectRef | list[ObjectRef]) -> Any:
    """The value of a call's result, or the values of several.

    Raises:
        InputError: what the worker raised.
        RunFailed: the same, or there is no room for the values.
        ray.exceptions.RayError: any other failure.
    """
    try:
        with full_store_explained():
            return ray.get(result)
    except RayTaskError as error:
        if isinstance(error.cause, InputError | RunFailed):
            raise error.cause from None
        raise


def size_of(value: Any) -> int:
    """Bytes of all tensors in a value that goes through the object store."""
    if isinstance(value, HostTensor):
        return value.array.nbytes
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if is_dataclass(value) and not isinstance(value, type):
        return sum(size_of(getattr(value, own.name)) for own in fields(value))
    return sum(map(size_of, value)) if isinstance(value, list | tuple) else 0


def put(value: Any) -> ObjectRef:
    """A value in the object store.

    Raises:
        StorageFailed: there is no room for it.
    """
    with full_store_explained():
        return ray.put(value)


def in_pieces(value: Any) -> list[bytes]:
    """Split what JSON can say into constructor arguments of an actor that may start again, for :func:`whole_of`.

    Ray sends small arguments along each time it starts an actor; larger ones it puts aside, and forgets after the first
    time. What it calls large is the cluster's to say (more than 100 kB unless told otherwise), and holds for each
    argument by itself. The headers of a 405B model take 355 kB, which compress to 10 kB: 21 pieces.

    Raises:
        TypeError: a part of the value is neither text, number, boolean or None nor a list or dict of those.
    """
    packed = zlib.compress(json.dumps(value).encode())
    return [packed[begin : begin + SMALL] for begin in range(0, len(packed), SMALL)]


def whole_of(pieces: Iterable[bytes]) -> Any:
    """The value that came in pieces."""
    return json.loads(zlib.decompress(b"".join(pieces)))


@contextmanager
def full_store_explained() -> Iterator[None]:
    try:
        yield
    except OutOfDiskError:
        raise StorageFailed(
            "Ray's object store is full, and so is the disk that it spills to, on one of the nodes. Free some space in "
            "Ray's temporary folder (/tmp/ray by default) or give Ray more object store memory; the same command goes "
            "on from what was done."
        ) from None
