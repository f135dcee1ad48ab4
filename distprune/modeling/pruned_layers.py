"""A decoder layer of a family's own class, changed to what pruning has left of it.

This file travels inside checkpoints, so it imports torch and the files beside it alone.

What is left of a layer is said by a dict, its "shape": `{"attention": {...} or None, "ffn": {...} or None}` with the
numbers of heads, widths, ranks and biases of each, and for attention that has lost rotary pairs which ones its KV
groups have kept. None stands for a part that was removed; a part that the shape doesn't name stays as its class made
it. Where a family keeps the parts is said by another, its "names".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .pruned_attention import NoAttention, cache_narrowly
from .pruned_projections import Columns, JoinedProjections, Projection, add_places, put_in_place, put_matrix

BRANCH = "branch"


def reshape_layer(layer: nn.Module, names: dict[str, Any], shape: dict[str, Any], layer_idx: int) -> None:
    """Change a layer, built from a configuration that has the shape's numbers of heads and neurons, to the shape."""
    if "attention" in shape:
        if shape["attention"] is None:
            setattr(layer, names["attention"], NoAttention(layer_idx))
        else:
            reshape_attention(getattr(layer, names["attention"]), names, shape["attention"])
    if "ffn" in shape:
        if shape["ffn"] is None:
            is_mixture = hasattr(getattr(layer, names["ffn"]), "experts")
            setattr(layer, names["ffn"], NoFeedForward(is_mixture and names.get("gives_scores", False)))
        elif "count" not in shape["ffn"]:  # a mixture of experts is as the configuration makes it
            ffn = layer if names["ffn"] is None else getattr(layer, names["ffn"])
            reshape_ffn(ffn, names, shape["ffn"])


# ---------------------------------------------------------------- attention


def reshape_attention(attention: nn.Module, names: dict[str, Any], shape: dict[str, Any]) -> None:
    output = getattr(attention, names["output"])
    heads, groups = shape["query_heads"], shape["kv_heads"]
    width = output.in_features // heads  # of a head of keys or values, as the class makes them
    pairs, value_dim = shape.get("rotary_pairs"), shape["value_dim"]
    keys = Columns([columns_of_pairs(kept, width) for kept in pairs], width) if pairs else None
    values = Columns([list(range(value_dim))] * groups, width) if value_dim < width else None
    queries = attended = None
    if pairs:
        queries = Columns([columns_of_pairs(kept, width) for kept in pairs for _ in range(heads // groups)], width)
    if values:
        attended = Columns([list(range(value_dim))] * heads, width)

    inputs = {
        names["query"]: (shape.get("query_rank"), queries),
        names["key"]: (shape.get("key_rank"), keys),
        names["value"]: (None, values),
    }
    if names["qkv"] is None:
        for name, (rank, columns) in inputs.items():
            replace_map(attention, name, rank, scatter=columns)
    elif any(rank or columns for rank, columns in inputs.values()):
        split_map(attention, names["qkv"], inputs, heads, groups, width)
    if shape.get("output_bias") and output.bias is None:
        add_bias(output)
    replace_map(attention, names["output"], shape.get("output_rank"), gather=attended)
    if keys or values:
        cache_narrowly(attention, keys, values)


def columns_of_pairs(pairs: list[int], width: int) -> list[int]:
    """The coordinates of a head's rotary pairs, the first ones of all pairs before the second ones."""
    return [*pairs, *(pair + width // 2 for pair in pairs)]


def replace_map(
    parent: nn.Module, name: str, rank: int | None, gather: Columns | None = None, scatter: Columns | None = None
) -> None:
    """Put factors or a narrow matrix in the place of a linear map, where anything of it was changed."""
    if rank is None and gather is None and scatter is None:
        return
    linear = getattr(parent, name)
    inputs = gather.heads * gather.kept if gather else linear.in_features
    outputs = scatter.heads * scatter.kept if scatter else linear.out_features
    put_matrix(parent, name, inputs, outputs, rank, linear.bias is not None)
    put_in_place(parent, name, Projection(parent, name, gather, scatter))


def split_map(
    parent: nn.Module, qkv: dict[str, Any], inputs: dict[str, tuple], heads: int, groups: int, width: int
) -> None:
    """The same for the one map that gives queries, keys and values: each has a matrix or factors of its own."""
    linear = getattr(parent, qkv["name"])
    projections = []
    for (name, (rank, columns)), of in zip(inputs.items(), (heads, groups, groups), strict=True):
        outputs = columns.heads * columns.kept if columns else of * width
        put_matrix(parent, name, linear.in_features, outputs, rank, linear.bias is not None)
        projections.append(Projection(parent, name, scatter=columns))
    put_in_place(parent, qkv["name"], JoinedProjections(projections, groups if qkv["by_head"] else None))


def add_bias(linear: nn.Linear) -> None:
    linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


# ---------------------------------------------------------------- feed-forward network


def reshape_ffn(ffn: nn.Module, names: dict[str, Any], shape: dict[str, Any]) -> None:
    down = getattr(ffn, names["down"])
    if shape.get("down_bias") and down.bias is None:
        add_bias(down)
    if shape.get("branch_rank"):
        put_matrix(ffn, BRANCH, down.out_features, down.out_features, shape["branch_rank"], bias=False)
        ffn.register_forward_hook(add_branch)


def add_branch(ffn: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """A hook: a linear map of low rank of the network's input is added to its output."""
    return output + ffn.left[BRANCH](ffn.right[BRANCH](args[0]))


class NoFeedForward(nn.Module):
    """Stands where the feed-forward network was: it adds nothing."""

    def __init__(self, gives_scores: bool = False):
        super().__init__()
        self._gives_scores = gives_scores

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        nothing = torch.zeros_like(hidden_states)
        return (nothing, None) if self._gives_scores else nothing


__all__ = ["add_places", "reshape_layer"]
