"""Attention whose keys and values are narrower than its class makes them, or which is not there at all.

This file travels inside checkpoints, so it imports torch and the files beside it alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .pruned_projections import Columns

#: What transformers calls the cache that it hands to attention, by version and family.
CACHES = ("cache", "past_key_values", "layer_past", "past_key_value")


class NarrowCache:
    """A cache of keys and values that holds what is kept of them alone: wide ones go in, and wide ones come out."""

    def __init__(self, cache: Any, keys: Columns | None, values: Columns | None):
        self._cache, self._keys, self._values = cache, keys, values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any):
        key_states, value_states = self._cache.update(
            across_heads(self._keys, "gather", key_states),
            across_heads(self._values, "gather", value_states),
            *args,
            **kwargs,
        )
        return across_heads(self._keys, "scatter", key_states), across_heads(self._values, "scatter", value_states)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


def across_heads(columns: Columns | None, change: str, states: torch.Tensor) -> torch.Tensor:
    """States (batch, heads, tokens, width) with the columns of every head gathered or scattered."""
    if columns is None:
        return states
    rows = getattr(columns, change)(states.transpose(1, 2).flatten(2))
    return rows.unflatten(2, (columns.heads, -1)).transpose(1, 2)


def cache_narrowly(attention: nn.Module, keys: Columns | None, values: Columns | None) -> None:
    """Let what an attention caches of keys and values be as wide as what is left of them."""
    attention.register_forward_pre_hook(NarrowsCache(keys, values), with_kwargs=True)


class NarrowsCache:
    """A hook and not a class of attention, since servers read how a class calls its kernel from its code."""

    def __init__(self, keys: Columns | None, values: Columns | None):
        self._keys, self._values = keys, values

    def __call__(self, attention: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        caches = {name: kwargs[name] for name in CACHES if kwargs.get(name) is not None}
        return args, kwargs | {name: NarrowCache(cache, self._keys, self._values) for name, cache in caches.items()}


class NoAttention(nn.Module):
    """Stands where attention was: it adds nothing."""

    def __init__(self, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        for name in CACHES:
            if kwargs.get(name) is not None:
                # One number a token, since a layer's cache also tells how many tokens were seen.
                seen = hidden_states[:, None, :, :1]
                kwargs[name].update(seen, seen, self.layer_idx)
        return torch.zeros_like(hidden_states), None
