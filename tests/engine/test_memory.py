"""What a process keeps of memory that tensors have left."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 2**20
# Four tensors of 20 MiB, and by how much they let the process grow: when they are there, when they are gone, and the
# same for four others. It is bytes that count, whatever pages the kernel gives them in.
CODE = """
import os
import torch
from distprune.engine.telemetry.process_memory import keep_freed_memory

def resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def growth() -> list[int]:
    begin, found = resident(), []
    for _ in range(2):
        tensors = [torch.ones(5 * 2**20) for _ in range(4)]
        found.append(resident() - begin)
        del tensors
        found.append(resident() - begin)
    return found

torch.ones(1000)
print(*growth())
keep_freed_memory()
print(*growth())
"""
# glibc begins with these thresholds, but raises them, by itself, after what a process happened to do while it imported.
AT_FIRST = {"MALLOC_MMAP_THRESHOLD_": str(128 * 1024), "MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not Path("/proc/self/statm").exists(), reason="needs glibc and /proc"
)
@pytest.mark.parametrize("huge_pages", ["0", "1"])
def test_tensors_take_up_what_others_have_left(huge_pages):
    environment = os.environ | AT_FIRST | {"GLIBC_TUNABLES": f"glibc.malloc.hugetlb={huge_pages}"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True, env=environment)
    plain, kept = ([int(growth) / MIB for growth in line.split()] for line in done.stdout.splitlines())
    assert plain == pytest.approx([80, 0, 80, 0], abs=30)
    assert kept == pytest.approx([80, 80, 80, 80], abs=30)  # alignment may cost room for one tensor
