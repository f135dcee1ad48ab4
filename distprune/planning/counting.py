"""What code does, counted while it runs on tensors without values: operations by kind, and memory while it lives.

The tensors are torch's fake ones, which have shapes, dtypes and devices, a GPU's among them where there is none. So
what is counted is what the code itself asks torch for, whatever model or method it is of.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distprune.planning.kernels import Kernel, kernel_of
from distprune.planning.unknown import distinct, known_without_values, without_masks
from distprune.solvers.expected import REPEATED


@dataclass(frozen=True)
class Counts:
    """What some code did.

    Attributes:
        kernels: how often it ran what.
        peak: bytes that lived at once of what it made, by kind of device.
        read: bytes from the checkpoint.
    """

    kernels: Mapping[Kernel, int]
    peak: Mapping[str, int]
    read: int = 0

    def flops(self, *kinds: str) -> float:
        """The floating-point operations of kernels of these kinds."""
        return sum(count * kernel.flops for kernel, count in self.kernels.items() if kernel.kind in kinds)

    def bytes(self, kind: str) -> float:
        """The bytes of kernels of a kind."""
        return sum(count * kernel.bytes for kernel, count in self.kernels.items() if kernel.kind == kind)


class Counting(TorchDispatchMode):
    """Counts the kernels that run while it is entered, and the bytes of what they make for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.read = 0
        self._known: set[int] = set()

    def take(self) -> Counts:
        """What was done since this was last asked. What lives goes on to live."""
        counts = Counts(self.kernels, self.peak, self.read)
        self.kernels, self.peak, self.read = Counter(), dict(self.live), 0
        return counts

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "prim":
            return NotImplemented
        if (known := known_without_values(function, args)) is not None:
            return known
        if (values := distinct(function, args)) is not None:
            return values
        if function._can_decompose():
            with self:
                return function.decompose(*args, **kwargs)
        args = without_masks(function, args)
        result = function(*args, **kwargs)
        given, made = tensors_in((args, kwargs)), tensors_in(result)
        if (kernel := kernel_of(function, args, kwargs, given, made)) is not None:
            self.kernels[kernel] += REPEATED.get()
        self._hold(given, made, kernel)
        return result

    def _hold(self, given: list[Tensor], made: list[Tensor], kernel: Kernel | None) -> None:
        before = {id(tensor.untyped_storage()) for tensor in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if id(storage) in before or id(storage) in self._known:
                continue
            device, size = tensor.device.type, storage.nbytes()
            if device == "meta":
                continue
            self._known.add(id(storage))
            self.live[device] += size
            weakref.finalize(storage, self._forget, id(storage), device, size)
        for device, size in self.live.items():
            workspace = kernel.workspace if kernel and kernel.device == device else 0
            self.peak[device] = max(self.peak.get(device, 0), size + workspace)

    def _forget(self, storage: int, device: str, size: int) -> None:
        self._known.discard(storage)
        self.live[device] -= size


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
