"""A checkpoint of which the headers are known, whose tensors have no values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from distprune.checkpoint import Checkpoint
from distprune.checkpoint.reader import in_parts
from distprune.planning.counting import Counting


@dataclass
class ValuelessCheckpoint:
    """Reads as :class:`~distprune.checkpoint.Checkpoint` does what is not there.

    Attributes:
        headers: of the checkpoint.
        counting: is told what is read; None where nobody counts.
    """

    headers: Checkpoint
    counting: Counting | None = None

    @property
    def tensors(self):
        return self.headers.tensors

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names, in the host's memory."""
        return {name: self._tensor(name, self.tensors[name].shape) for name in names}

    def read_rows(self, name: str, rows: Tensor) -> Tensor:
        """Rows of a tensor."""
        return self._tensor(name, (len(rows), *self.tensors[name].shape[1:]))

    def check_finite(self, names: Iterable[str]) -> None:
        """Read tensors one after another, and go over each."""
        for name in names:
            for part in in_parts(self, name):
                part.aminmax()

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=self.tensors[name].dtype)
        if self.counting is not None:
            self.counting.read += tensor.nbytes
        return tensor
