"""What evaluations ask of a model, wherever it is, and how it is loaded there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from distprune.hardware import AUTO


@dataclass(frozen=True)
class Loading:
    """How a model is loaded and run; ``batch_size`` is that of lm-eval's requests and of windows."""

    device: str = "auto"
    dtype: str = AUTO
    batch_size: int = 16
    trust_remote_code: bool = False


class Answering(Protocol):
    """One model, here or on workers. A batch's answer depends on nothing but the batch."""

    def dtype(self) -> str:
        """The dtype that it computes in. Its weights are loaded by then."""
        ...

    def ask(self, question: str, batches: Sequence[Any]) -> list[Any]:
        """The answers to one of :class:`Scorer`'s questions, in the order of the batches."""
        ...
