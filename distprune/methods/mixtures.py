"""A mixture of experts without some of its experts, or with narrower ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distprune.layers.parts import Experts, FeedForward
from distprune.layers.parts import keep_experts as keep_experts


def with_each(experts: Experts, networks: Sequence[FeedForward]) -> Experts:
    """The mixture with other networks in the place of its experts, one for each, all of one width."""

    def stacked(tensors: Sequence[Sequence[Tensor | None]]) -> Tensor | None:
        rows = [[tensor for tensor in row if tensor is not None] for row in tensors]
        return torch.stack([torch.stack(row) for row in rows]) if rows[0] else None

    def joined(tensors: Sequence[Tensor | None]) -> Tensor | None:
        there = [tensor for tensor in tensors if tensor is not None]
        return torch.stack(there) if there else None

    inputs = stacked([[linear.weight for linear in network.inputs] for network in networks])
    down = joined([network.down.weight for network in networks])
    assert inputs is not None and down is not None
    return replace(
        experts,
        inputs=inputs,
        down=down,
        input_bias=stacked([[linear.bias for linear in network.inputs] for network in networks]),
        down_bias=joined([network.down.bias for network in networks]),
    )


def best_experts(worth: Tensor, kept: int, groups: int = 1) -> Tensor:
    """The numbers of the ``kept`` experts that are worth most, ascending, as many from each group of neighbours.

    Args:
        worth: of each expert, (E,).
        kept: a multiple of ``groups``.
        groups: that the router chooses from first.
    """
    by_group = worth.unflatten(0, (groups, -1))
    best = by_group.topk(kept // groups, dim=1).indices.sort(dim=1).values
    return (best + torch.arange(groups, device=worth.device)[:, None] * by_group.shape[1]).flatten()
