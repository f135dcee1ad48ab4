"""What makes a GPU give the same bytes twice."""

from __future__ import annotations

import os

import torch


def make_cuda_deterministic() -> None:
    """Choose CUDA kernels that add up in a fixed order: attention's backward pass and cuBLAS don't unless told to."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward pass adds up in any order, told or not
    # Else every new tensor would be filled with NaN before it is written to.
    torch.utils.deterministic.fill_uninitialized_memory = False
