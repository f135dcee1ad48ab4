"""What code does, counted while it runs on tensors without values: operations by kind, and memory while it lives.

The tensors are torch's fake ones, which have shapes, dtypes and devices, a GPU's among them where there is none. So what
is counted is what the code itself asks torch for, whatever model or method it is of.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distprune.planning.kernels import Kernel, kernel_of
from distprune.planning.pretended import PretendedGpu
from distprune.planning.unknown import known_without_values, without_masks
from distprune.solvers.expected import REPEATED


@dataclass(frozen=True)
class Counts:
    """What some code did.

    Attributes:
        kernels: how often it ran what.
        peak: bytes that lived at once of what it made, by kind of device.
        read: bytes from the checkpoint.
    """

    kernels: Counter[Kernel] = field(default_factory=Counter)
    peak: dict[str, int] = field(default_factory=dict)
    read: int = 0

    def __add__(self, other: Counts) -> Counts:
        """One after the other, nothing of the one being left while the other runs."""
        devices = {*self.peak, *other.peak}
        peak = {device: max(self.peak.get(device, 0), other.peak.get(device, 0)) for device in devices}
        return Counts(self.kernels + other.kernels, peak, self.read + other.read)

    def flops(self, *kinds: str) -> float:
        """The floating-point operations of kernels of these kinds, or of all."""
        return sum(count * kernel.flops for kernel, count in self.kernels.items() if not kinds or kernel.kind in kinds)


class Counting(TorchDispatchMode):
    """Counts the kernels that run while it is entered, and the bytes of what they make for as long as it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[Kernel] = Counter()
        self.live: Counter[str] = Counter()
        self.peak: dict[str, int] = {}
        self.read = 0
        self._known: set[int] = set()

    @property
    def counts(self) -> Counts:
        return Counts(Counter(self.kernels), dict(self.peak), self.read)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "prim":
            return NotImplemented
        if (known := known_without_values(function, args)) is not None:
            return known
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


@contextmanager
def valueless() -> Iterator[None]:
    """Inside, tensors that are made have no values, and take no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True), PretendedGpu():
        yield


def tensors_in(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
