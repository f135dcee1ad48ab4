"""A GPU that no machine has: a kind of device which tensors without values can be on.

It is torch's lazy one, with nothing behind it. CUDA's own would not do: torch asks its driver on the way, which is
there only where a GPU is. That torch has no automatic casts for it counts distillation in float32: more than it takes.
"""

from __future__ import annotations

import torch

IMAGINED_GPU = torch.device("lazy", 0)
