"""Peak memory of the process it runs in."""

from __future__ import annotations

import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class PeakMemory:
    """Bytes: resident memory of the process, and what torch allocated on its GPU (0 without one)."""

    resident: int
    device: int


def peak_memory() -> PeakMemory:
    device = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0
    return PeakMemory(resident=_peak_resident(), device=device)


def _peak_resident() -> int:
    """VmHWM where /proc has it: unlike getrusage's figure it does not start at the parent process's peak."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
