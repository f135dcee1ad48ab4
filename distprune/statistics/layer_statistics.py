"""What was collected for one decoder layer while calibration hidden states ran through it."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from distprune.statistics.moments import Activations, Cross, Gram, HeadGram, Mean, Moment, Peak, Power


class LayerStatistics:
    """Running totals of the asked-for moments, in float32 on the layer's device; nothing else is computed or kept.

    Asking for a moment that was not collected is a mistake in the method and raises ``KeyError``.
    """

    def __init__(self, moments: Iterable[Moment]):
        self._totals: dict[Moment, Tensor | None] = dict.fromkeys(moments)
        self.tokens = 0

    def update(self, activations: Activations) -> None:
        """Add one micro-batch of activations, each (tokens, width)."""
        for moment, total in self._totals.items():
            batch = moment.measure(activations)
            self._totals[moment] = batch if total is None else moment.merge(total, batch)
        self.tokens += len(next(iter(activations.values())))

    def _average(self, moment: Moment) -> Tensor:
        return self._totals[moment] / self.tokens

    def mean(self, tap: str) -> Tensor:
        return self._average(Mean(tap))

    def power(self, tap: str) -> Tensor:
        return self._average(Power(tap))

    def rms(self, tap: str) -> Tensor:
        """Root mean square of every channel, (width,)."""
        return self.power(tap).sqrt()

    def peak(self, tap: str) -> Tensor:
        """Largest magnitude of every channel, (width,)."""
        return self._totals[Peak(tap)]

    def gram(self, tap: str) -> Tensor:
        return self._average(Gram(tap))

    def cross(self, tap: str, other: str) -> Tensor:
        return self._average(Cross(tap, other))

    def head_gram(self, tap: str, heads: int) -> Tensor:
        return self._average(HeadGram(tap, heads))
