"""How long what was counted takes."""

from __future__ import annotations

from dataclasses import dataclass

from distprune.planning.counting import Counts
from distprune.planning.kernels import EIGEN, FLOAT32, FLOAT64, HALF, LINK, Kernel
from distprune.planning.rates import Rates

#: Bytes a second of files that the host's memory still holds.
CACHED = 1e10


@dataclass(frozen=True)
class Clock:
    """Tells seconds from counts.

    Attributes:
        device: rates of where layers run.
        host: rates of the CPU beside it; the same where there is no GPU.
        reading: bytes a second from the checkpoint.
        slowdown: of a worker with more threads than there are cores for.
    """

    device: Rates
    host: Rates
    reading: float
    slowdown: float = 1.0

    def seconds(self, counts: Counts) -> float:
        """One worker's time, one kernel after the other."""
        kernels = sum(count * self._seconds(kernel) for kernel, count in counts.kernels.items())
        return self.slowdown * kernels + counts.read / self.reading

    def _seconds(self, kernel: Kernel) -> float:
        """A kernel computes while it reads and writes, so the slower of the two counts."""
        rates = self.host if kernel.device == "cpu" else self.device
        if kernel.kind == LINK:
            return kernel.bytes / (self.device.locked if kernel.device == "cpu" else self.device.link)
        computing = kernel.flops / self._rate(kernel.kind, rates) if kernel.flops else 0.0
        return max(computing, kernel.bytes / rates.memory, rates.launch)

    @staticmethod
    def _rate(kind: str, rates: Rates) -> float:
        return {HALF: rates.half, FLOAT32: rates.float32, FLOAT64: rates.float64, EIGEN: rates.eigen}[kind]
