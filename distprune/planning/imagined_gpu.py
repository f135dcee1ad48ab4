"""A GPU that no machine has: a kind of device which tensors without values can be on.

It is torch's place for devices from outside (PrivateUse1), with nothing behind it. CUDA's own would not do: torch asks
its driver on the way, which is there only where a GPU is.
"""

from __future__ import annotations

from functools import cache

import torch
from torch.utils import backend_registration

NAME = "imagined"
LIBRARY = torch.library.Library("_", "IMPL")


@cache
def imagined_gpu() -> torch.device:
    """The device. A backend that is registered in its place already serves as well."""
    name = torch._C._get_privateuse1_backend_name()
    if name == "privateuseone":
        backend_registration._setup_privateuseone_for_python_backend(NAME, _Nothing(), _NothingThere())
        name = NAME
        # There is no list of what to cast, so distillation is counted in float32: more than it takes.
        LIBRARY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    return torch.device(name, 0)


class _Nothing:
    """The device's module, ``torch.imagined``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return False

    def current_device(self) -> int:
        return 0

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None:
        pass

    def device_count(self) -> int:
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


class _NothingThere(torch._C._acc.PrivateUse1Hooks):
    """What torch asks to know whether there is such a device."""

    def is_available(self) -> bool:
        return False

    def has_primary_context(self, dev_id: int) -> bool:
        return False

    def is_built(self) -> bool:
        return False
