"""Which coordinates of a head a family's rotary embedding turns together."""

from __future__ import annotations

import sys

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

WIDTH = 8


def turns_halves(attention: type[nn.Module], config: PreTrainedConfig) -> bool:
    """Whether the embedding turns the coordinates i and i + width / 2 of every head, as Llama's does, and all of them.

    Found out by trying the function that the attention's module has for it.
    """
    own = getattr(sys.modules[attention.__module__], apply_rotary_pos_emb.__name__, None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if own is None or float(parameters.get("partial_rotary_factor", 1.0)) != 1.0:
        return False
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 1, 3, WIDTH, generator=generator) for _ in range(2))
    angles = torch.randn(1, 3, WIDTH // 2, generator=generator).repeat(1, 1, 2)
    given = query, key, angles.cos(), angles.sin()
    try:
        found = own(*given)
    except (TypeError, ValueError, RuntimeError):
        return False
    expected = apply_rotary_pos_emb(*given)
    return len(found) == 2 and all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
