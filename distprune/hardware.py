"""In which dtype the hardware computes a checkpoint's forward passes at speed: what ``dtype: auto`` means.

Where there are no units for 16-bit matrix products, they are emulated: bfloat16 takes from twice (AVX-512) to eight
times (AVX2) as long as float32 there.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

AUTO = "auto"
#: From Ampere on, GPUs multiply matrices of bfloat16.
BFLOAT16_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class ComputeDtype:
    """The dtype of forward passes, and why it is that one."""

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """As ``--dtype`` takes it."""
        return name_of(self.dtype)

    def __str__(self) -> str:
        return f"Forward passes are in {self.name}: {self.reason}."


def compute_dtype(stored: torch.dtype, device: torch.device | str) -> ComputeDtype:
    """The checkpoint's dtype if this machine's device has units for it, else float32.

    Args:
        stored: of the checkpoint's weights.
        device: where forward passes run; "cuda" stands for all GPUs that this process sees.
    """
    device = torch.device(device)
    if stored.itemsize != 2:
        return ComputeDtype(torch.float32, f"the checkpoint is in {name_of(stored)}")
    lacking = _gpu_without(stored, device) if device.type == "cuda" else _cpu_without(stored)
    if lacking is None:
        return ComputeDtype(stored, "the checkpoint's own dtype")
    return ComputeDtype(torch.float32, f"the checkpoint is in {name_of(stored)}, for which {lacking} has no units")


def name_of(dtype: torch.dtype) -> str:
    """``float32`` of ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def _cpu_without(dtype: torch.dtype) -> str | None:
    """This machine's CPU, if it has no units for a 16-bit dtype."""
    asked = {torch.bfloat16: _multiplies_bfloat16, torch.float16: lambda: _asked_of_onednn("fp16")}
    return None if asked[dtype]() else f"the CPU of {platform.node()}"


def _multiplies_bfloat16() -> bool:
    if not _asked_of_onednn("bf16"):
        return False
    # oneDNN also says yes where AVX-512 has no instructions for bfloat16, and multiplies it there at a third of
    # float32's speed.
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not is_x86 or any(_instruction(name) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))


def _asked_of_onednn(kind: str) -> bool:
    """Whether oneDNN has kernels for it here; builds of torch without oneDNN have none."""
    ask: Callable[[], bool] | None = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported", None)
    return ask is not None and ask()


def _instruction(name: str) -> bool:
    """What torch says of an instruction set; yes where it knows no such question."""
    return getattr(torch.cpu, name, lambda: True)()


def _gpu_without(dtype: torch.dtype, device: torch.device) -> str | None:
    """The first of the device's GPUs that has no units for a 16-bit dtype, if any."""
    if dtype == torch.float16:
        return None
    for index in range(torch.cuda.device_count()) if device.index is None else (device.index,):
        if torch.cuda.get_device_capability(index) < BFLOAT16_CAPABILITY:
            return f"the {torch.cuda.get_device_name(index)} of {platform.node()}"
    return None
