"""What the loss would lose by what a layer's modules lose.

An edit ΔW of a projection with input x changes its output by ΔW x, and the loss, to second order and with the outer
product of gradients for the Hessian, by ½E[(gᵀΔW x)²]. With gradients and inputs taken for independent that is
½tr(C ΔW H ΔWᵀ), where C = E[gᵀg] and H = E[xᵀx] (the Kronecker-factored Fisher matrix, Martens & Grosse, ICML 2015). So
an output projection is looked at in the metric C: multiplied by its root, errors count by their Euclidean norm.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from distprune.layers.parts import Attention, FeedForward, Linear
from distprune.layers.shapes import AttentionShape
from distprune.layers.sites import (
    ATTENDED,
    ATTENTION_INPUT,
    ATTENTION_OUTPUT,
    FFN_INPUT,
    FFN_OUTPUT,
    KEYS,
    NEURONS,
    QUERIES,
)
from distprune.methods.base import Profile
from distprune.methods.units import output_slices
from distprune.solvers import (
    elimination_path,
    linear_branch,
    output_aware_rotation,
    output_projections,
    truncation_errors,
)
from distprune.statistics import LayerStatistics

#: At so many widths the cost of an FFN is computed; between them it is taken to be linear.
STEPS = 64
#: At these shares of the FFN's width it is computed what a branch beside it saves.
BRANCH_SHARES = (3 / 4, 1 / 2, 1 / 4)
#: A branch seems to save twice as much on the text that it is fitted to as it does on other text. Fitted with so many
#: times the damping, it seems to save as much as it does.
HONEST_DAMPING = 10


def attention_curves(attention: Attention, statistics: LayerStatistics, damping: float) -> Profile:
    """Ways to make attention smaller, and what each costs.

    Returns:
        - group_order (g,): the KV groups, those that are missed least first;
          group_costs (g + 1,): of going without the first 0, 1... of them.
        - value_rotation (g, v, v): after which the first value neurons of a group matter most;
          value_costs (g, v + 1): of keeping the first 0, 1... of them.
        - pair_order (g, p/2): the rotary pairs of each group, those that are missed least first;
          pair_costs (g, p/2 + 1): of going without the first 0, 1... of them.
    """
    groups = attention.kv_heads
    gram = statistics.gram(ATTENDED)
    root = metric_root(statistics.gram(ATTENTION_OUTPUT.gradient), damping)
    output = (root.mT @ attention.output.weight.double()).float()
    order, group_errors = elimination_path(output, gram, damping, width=len(gram) // groups)

    slices = output_slices(replace(attention, output=Linear(output)))
    blocks = gram.unflatten(0, (attention.query_heads, -1)).unflatten(2, (attention.query_heads, -1))
    head_grams = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)
    rotation, value_errors = output_aware_rotation(slices, head_grams.unflatten(0, (groups, -1)).mean(dim=1))

    pairs = statistics.scaling_power(QUERIES, QUERIES.gradient, groups, attention.shape.query_key_dim // 2)
    pairs = pairs.double().sort(dim=1, stable=True)
    none = pairs.values.new_zeros(groups, 1)
    return {
        "group_order": order,
        "group_costs": group_errors / 2,
        "value_rotation": rotation,
        "value_costs": value_errors / 2,
        "pair_order": pairs.indices,
        "pair_costs": torch.cat([none, pairs.values.cumsum(1)], dim=1) / 2,
    }


def truncations(attention: Attention, statistics: LayerStatistics, damping: float) -> Profile:
    """What it costs to factor the query, key and output projections.

    Returns:
        Of each, such as "query": query_costs (rank + 1,): of being a product of factors of rank 0, 1...; query_left
        (out, rank) and query_right (rank, out): the projection of its outputs on what matters most.
    """
    projections = {
        "query": (attention.query, ATTENTION_INPUT, QUERIES),
        "key": (attention.key, ATTENTION_INPUT, KEYS),
        "output": (attention.output, ATTENDED, ATTENTION_OUTPUT),
    }
    profile: dict[str, Tensor] = {}
    for name, (projection, given, output) in projections.items():
        root = metric_root(statistics.gram(output.gradient), damping)
        profile |= truncation(name, projection, statistics.gram(given), root, damping)
    return profile


def truncation(name: str, projection: Linear, gram: Tensor, root: Tensor, damping: float) -> Profile:
    """A projection's costs by rank, and how to truncate it, up to the greatest rank that saves anything."""
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    left, right, errors = output_projections(projection.weight, damped, root)
    most = greatest_rank(*projection.weight.shape)
    return {
        f"{name}_costs": errors[: most + 1] / 2,
        f"{name}_left": left[:, :most].contiguous(),
        f"{name}_right": right[:most].contiguous(),
    }


def greatest_rank(out: int, inputs: int) -> int:
    """The greatest at which two factors hold less than their product."""
    return (out * inputs - 1) // (out + inputs)


def truncations_bytes(hidden_size: int, shape: AttentionShape) -> int:
    """Of what :func:`truncations` gives, except for the costs."""
    sizes = {
        "query": (shape.query_heads * shape.query_key_dim, hidden_size),
        "key": (shape.kv_heads * shape.query_key_dim, hidden_size),
        "output": (hidden_size, shape.query_heads * shape.value_dim),
    }
    return sum(2 * out * greatest_rank(out, inputs) * torch.float32.itemsize for out, inputs in sizes.values())


def ffn_curve(ffn: FeedForward, statistics: LayerStatistics, damping: float) -> Profile:
    """What the FFN costs by width.

    Returns:
        neuron_order (f,): the neurons, those that are missed least first; ffn_widths (steps + 1,): falling, from all
        neurons to none; ffn_costs (steps + 1,): of keeping so many.
    """
    width = ffn.down.weight.shape[1]
    batch = ceil(width / STEPS)
    root = metric_root(statistics.gram(FFN_OUTPUT.gradient), damping)
    down = (root.mT @ ffn.down.weight.double()).float()
    order, errors = elimination_path(down, statistics.gram(NEURONS), damping, batch=batch)
    gone = torch.arange(len(errors), device=errors.device) * batch
    return {
        "neuron_order": order,
        "ffn_widths": (width - gone).clamp(min=0),
        "ffn_costs": errors / 2,
    }


def branch_savings(
    ffn: FeedForward, statistics: LayerStatistics, order: Tensor, damping: float, branch_damping: float
) -> Profile:
    """What a linear branch of low rank beside the FFN, a map of the same input, saves of what narrow FFNs cost.

    Args:
        order: the neurons, those that go first before the others.

    Returns:
        - branch_widths (s,): some widths of the FFN, falling;
          branch_savings (s, d / 4 + 1): of a branch of rank 0, 1... beside an FFN of each of these widths;
        - ffn_metric_root (d, d): of the metric that branches are truncated in.
    """
    gram, input_gram = statistics.gram(NEURONS), statistics.gram(FFN_INPUT)
    cross = statistics.cross(FFN_INPUT, NEURONS)
    root = metric_root(statistics.gram(FFN_OUTPUT.gradient), damping)
    honest = HONEST_DAMPING * branch_damping
    down, most = ffn.down.weight.float(), len(input_gram) // 4
    widths = [ceil(share * len(order)) for share in BRANCH_SHARES]
    savings = []
    for width in widths:
        branch, unknown = linear_branch(down, order[len(order) - width :], gram, input_gram, cross, honest)
        errors = truncation_errors(branch, unknown, root)
        savings.append((errors[0] - errors[: most + 1]) / 2)
    return {
        "branch_widths": torch.tensor(widths),
        "branch_savings": torch.stack(savings),
        "ffn_metric_root": root.float(),
    }


def metric_root(gradient_gram: Tensor, damping: float) -> Tensor:
    """The Cholesky factor R of C = E[gᵀg], damped, (d, d) in float64: ‖Rᵀe‖² = eᵀCe."""
    damped = gradient_gram.to(torch.float64, copy=True)
    scale = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(scale > 0, damping * scale, 1.0))
    return torch.linalg.cholesky(damped, out=damped)
