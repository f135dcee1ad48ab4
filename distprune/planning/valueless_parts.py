"""A folder of parts that keeps nothing: what is written of tensors without values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import Tensor

from distprune.checkpoint import WrittenFile


class ValuelessParts:
    """Stands in the place of a folder of parts."""

    def write(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole layers are given back, since they may go to the driver."""
        return tensors

    @contextmanager
    def piecewise(self, expected: Mapping[str, Tensor]) -> Iterator[tuple[Nowhere, WrittenFile]]:
        """Layers that come in pieces are let go of piece by piece."""
        size = sum(tensor.numel() * tensor.dtype.itemsize for tensor in expected.values())
        yield Nowhere(), WrittenFile("", size)


class Nowhere:
    """Where pieces go."""

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Let go of them."""
