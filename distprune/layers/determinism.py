"""What makes a GPU, or any number of CPU threads, give the same bytes twice."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def make_cuda_deterministic() -> None:
    """Choose CUDA kernels that add up in a fixed order, where there are any."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every new tensor would be filled with NaN before it is written to.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass adds up in any order, told or not


@contextmanager
def deterministic_attention() -> Iterator[None]:
    """Let attention's backward pass add up in a fixed order inside, if :func:`make_cuda_deterministic` was called.

    Its kernels do so only where what is not deterministic is an error. Solvers need some that are called that although
    they are not random in what is asked of them here, so elsewhere it can't be one.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=True)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Inside, the CPU computes with so many threads: on their number depends in which order sums add up."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
