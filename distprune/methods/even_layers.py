"""Layers that all lose as much, and profiles of which nothing is known."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from distprune.budgets import Target, has_plain_heads
from distprune.layers.shapes import LayerShape


def with_heads(shape: LayerShape, kv_heads: int, heads_per_group: int) -> LayerShape:
    """The shape with that many KV groups, and query heads in each."""
    return shape.with_attention(kv_heads=kv_heads, query_heads=kv_heads * heads_per_group)


def with_fewer_groups(target: Target, index: int, sparsity: float) -> LayerShape:
    """Dense layer ``index`` without the fraction ``sparsity`` of its KV groups, to the nearest whole one.

    At least one stays, and all where none may go.
    """
    shape = target.dense_shape(index)
    if not target.removable(index).heads:
        return shape
    kept = max(1, round((1 - sparsity) * shape.attention.kv_heads))
    return with_heads(shape, kept, shape.attention.heads_per_group)


def with_plain_groups(target: Target, index: int, sparsity: float) -> LayerShape:
    """The same, to the nearest number that a plain configuration can have."""
    shape = target.dense_shape(index)
    if not target.removable(index).heads:
        return shape
    dense = shape.attention
    possible = [with_heads(shape, groups, dense.heads_per_group) for groups in range(dense.kv_heads, 0, -1)]
    plain = [smaller for smaller in possible if has_plain_heads(target.model, smaller)]
    return min(plain, key=lambda smaller: abs(smaller.attention.kv_heads - (1 - sparsity) * dense.kv_heads))


class ProfileRead(Exception):
    """A plan depends on what is known of the layers' activations or gradients."""


class UnknownProfile(Mapping[str, torch.Tensor]):
    """A profile that can't be read: whether a method's plan needs one is seen by letting it plan.

    Raises:
        ProfileRead: whatever is asked of it.
    """

    def _refuse(self, *_: object):
        raise ProfileRead

    __getitem__ = __iter__ = __len__ = _refuse
