"""What a process keeps of memory that tensors have left."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

# Four tensors of 20 MiB at once, ten times; and how many pages the system had to give for them.
PAGES_OF_A_ROUND = 4 * 20 * 2**20 // os.sysconf("SC_PAGE_SIZE")
CODE = """
import resource
import torch
from distprune.engine.memory import keep_freed_memory

def pages() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        tensors = [torch.zeros(5 * 2**20) for _ in range(4)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

plain = pages()
keep_freed_memory()
pages()
print(plain, pages())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator")
def test_tensors_take_up_what_others_have_left():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert plain > 9 * PAGES_OF_A_ROUND
    assert kept < PAGES_OF_A_ROUND
