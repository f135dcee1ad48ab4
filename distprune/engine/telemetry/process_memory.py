"""Memory of the process it runs in: its peak, and what it keeps for reuse."""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass

import torch

from distprune.resident import peak_resident

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
    return PeakMemory(resident=peak_resident(), device=device)
