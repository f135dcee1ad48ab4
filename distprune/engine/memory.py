"""Memory of the process it runs in: its peak, and what it keeps for reuse."""

from __future__ import annotations

import ctypes
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

#: Of glibc's mallopt, and the largest values that serve: blocks below the one are taken from the heap, whose end is
#: given back when more than the other is free.
M_TRIM_THRESHOLD, TRIM_THRESHOLD = -1, 256 * 2**20
M_MMAP_THRESHOLD, MMAP_THRESHOLD = -3, 32 * 2**20


def keep_freed_memory() -> None:
    """Let memory that tensors have left serve the next ones, where glibc allocates it.

    Taken from the system anew for every tensor, its pages cost as much as what is computed in them.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD)
    libc.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD)


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
