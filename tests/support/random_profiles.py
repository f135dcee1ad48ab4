"""What curvature would have found in layers, made up: random costs that rise as it would have them."""

from __future__ import annotations

import torch

from distprune.layers.shapes import LayerShape
from distprune.methods import Profile


def rising(*size: int, generator: torch.Generator) -> torch.Tensor:
    """From zero on, convex: what goes first is missed least."""
    steps = torch.rand(*size, generator=generator, dtype=torch.float64).sort(dim=-1).values
    return torch.cat([steps.new_zeros(*size[:-1], 1), steps.cumsum(-1)], dim=-1)


def rank_costs(out: int, hidden_size: int, generator: torch.Generator) -> torch.Tensor:
    """Falling, from rank zero to the greatest that saves anything."""
    most = (out * hidden_size - 1) // (out + hidden_size)
    return rising(out, generator=generator).flip(0)[: most + 1] / 16


def profile_of(shape: LayerShape, seed: int, hidden_size: int = 256) -> Profile:
    """Random costs, everything of a layer mattering more or less than in the other layers."""
    generator = torch.Generator().manual_seed(seed)
    attention, steps = shape.attention, 32
    groups, pairs = attention.kv_heads, attention.query_key_dim // 2
    scale = 2.0**seed
    queries = attention.query_heads * attention.query_key_dim
    outputs = {"query": queries, "key": groups * attention.query_key_dim, "output": hidden_size}
    return {
        "group_order": torch.randperm(groups, generator=generator),
        "group_costs": scale * rising(groups, generator=generator),
        "value_rotation": torch.eye(attention.value_dim).repeat(groups, 1, 1),
        "value_costs": scale * rising(groups, attention.value_dim, generator=generator).flip(1) / 16,
        "pair_order": torch.stack([torch.randperm(pairs, generator=generator) for _ in range(groups)]),
        "pair_costs": scale * rising(groups, pairs, generator=generator) / 16,
        **{f"{name}_costs": scale * rank_costs(out, hidden_size, generator) for name, out in outputs.items()},
        "neuron_order": torch.randperm(shape.ffn.width, generator=generator),
        "ffn_widths": torch.arange(steps, -1, -1) * (shape.ffn.width // steps),
        "ffn_costs": scale * rising(steps, generator=generator),
    }
