"""What was collected for one decoder layer while calibration hidden states ran through it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from distprune.statistics.moments import Activations, Cross, Gram, HeadGram, Mean, Moment, Peak, Power, ScalingPower

# The name of their number among named averages.
TOKENS = "tokens"


class LayerStatistics:
    """Running totals of the asked-for moments, in float32; nothing else is computed or kept.

    Each is held once: it becomes its average in place when it is first read, and after that nothing can be added.
    What is read is not to be changed. Asking for a moment that was not collected is a mistake in the method and raises
    ``KeyError``.

    Args:
        moments: what to collect.
        device: where totals are kept; by default where the activations are.
    """

    def __init__(self, moments: Iterable[Moment], device: torch.device | None = None):
        self._totals: dict[Moment, Tensor | None] = dict.fromkeys(moments)
        self._averages: dict[Moment, Tensor] = {}
        self._device = device
        self.tokens = 0

    def update(self, activations: Activations) -> None:
        """Add one micro-batch of activations, each (tokens, width).

        Raises:
            RuntimeError: a moment has been read.
        """
        if self._averages:
            raise RuntimeError("statistics that have been read can't be added to")
        for moment, total in self._totals.items():
            if total is None:
                total = self._totals[moment] = zeros(moment, activations, self._device)
            moment.add(total, activations)
        self.tokens += len(next(iter(activations.values())))

    def to_tensors(self, moments: Iterable[Moment]) -> dict[str, Tensor]:
        """The averages of some of the moments as named tensors, for :meth:`from_tensors`; nothing of no moments."""
        averages = {str(moment): self._average(moment) for moment in moments}
        return {TOKENS: torch.tensor(self.tokens)} | averages if averages else {}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], moments: Iterable[Moment]) -> LayerStatistics | None:
        """Statistics that hold just the ``moments``; None if not all of them are among the tensors."""
        averages = {moment: tensors.get(str(moment)) for moment in moments}
        if TOKENS not in tensors or any(average is None for average in averages.values()):
            return None
        statistics = cls(())
        statistics.tokens, statistics._averages = int(tensors[TOKENS]), averages
        return statistics

    def _average(self, moment: Moment) -> Tensor:
        if moment not in self._averages:
            self._averages[moment] = moment.average(self._totals.pop(moment), self.tokens)
        return self._averages[moment]

    def mean(self, tap: str) -> Tensor:
        return self._average(Mean(tap))

    def power(self, tap: str) -> Tensor:
        return self._average(Power(tap))

    def rms(self, tap: str) -> Tensor:
        """Root mean square of every channel, (width,)."""
        return self.power(tap).sqrt()

    def peak(self, tap: str) -> Tensor:
        """Largest magnitude of every channel, (width,)."""
        return self._average(Peak(tap))

    def gram(self, tap: str) -> Tensor:
        return self._average(Gram(tap))

    def cross(self, tap: str, other: str) -> Tensor:
        return self._average(Cross(tap, other))

    def head_gram(self, tap: str, heads: int) -> Tensor:
        return self._average(HeadGram(tap, heads))

    def scaling_power(self, tap: str, other: str, groups: int, pairs: int) -> Tensor:
        return self._average(ScalingPower(tap, other, groups, pairs))


def zeros(moment: Moment, activations: Activations, device: torch.device | None) -> Tensor:
    """A total to begin with: an ordinary tensor, though layers run in inference mode, since it changes after that."""
    device = device or activations[moment.tap].device
    with torch.inference_mode(False):
        return torch.zeros(moment.size(activations), dtype=torch.float32, device=device)
