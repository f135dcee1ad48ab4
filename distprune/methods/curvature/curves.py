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

from distprune.decoder_layer import DecoderLayer, Linear
from distprune.methods.base import Profile
from distprune.methods.units import output_slices
from distprune.solvers import elimination_path, output_aware_rotation
from distprune.statistics import LayerStatistics

#: At so many widths the cost of an FFN is computed; between them it is taken to be linear.
STEPS = 64
#: What keeps a metric of fewer tokens than channels factorable, over the mean of its diagonal.
JITTER = 1e-6


def attention_curves(layer: DecoderLayer, statistics: LayerStatistics, damping: float) -> Profile:
    """Three ways to make attention smaller, and what each costs.

    Returns:
        - group_order (g,): the KV groups, those that are missed least first;
          group_costs (g + 1,): of going without the first 0, 1... of them.
        - value_rotation (g, v, v): after which the first value neurons of a group matter most;
          value_costs (g, v + 1): of keeping the first 0, 1... of them.
        - pair_order (g, p/2): the rotary pairs of each group, those that are missed least first;
          pair_costs (g, p/2 + 1): of going without the first 0, 1... of them.
    """
    groups = layer.kv_heads
    gram = statistics.gram("attention_values")
    metric = metric_root(statistics.gram("attention_output_gradient"))
    output = in_metric(layer.output, metric)
    order, group_errors = elimination_path(output, gram, damping, width=len(gram) // groups)

    slices = output_slices(replace(layer, output=Linear(output)))
    blocks = gram.unflatten(0, (layer.query_heads, -1)).unflatten(2, (layer.query_heads, -1))
    head_grams = blocks.diagonal(dim1=0, dim2=2).movedim(2, 0)
    rotation, value_errors = output_aware_rotation(slices, head_grams.unflatten(0, (groups, -1)).mean(dim=1))

    # A pair's part of the scores is scaled by its queries: what the loss feels of that is Σ q∘g over the group's heads.
    pairs = (
        statistics.scaling_power("queries", "query_gradient", groups, layer.shape.query_key_dim // 2)
        .double()
        .sort(dim=1, stable=True)
    )
    none = pairs.values.new_zeros(groups, 1)
    return {
        "group_order": order,
        "group_costs": group_errors / 2,
        "value_rotation": rotation,
        "value_costs": value_errors / 2,
        "pair_order": pairs.indices,
        "pair_costs": torch.cat([none, pairs.values.cumsum(1)], dim=1) / 2,
    }


def ffn_curve(layer: DecoderLayer, statistics: LayerStatistics, damping: float) -> Profile:
    """What the FFN costs by width.

    Returns:
        neuron_order (f,): the neurons, those that are missed least first; ffn_widths (steps + 1,): falling, from all
        neurons to none; ffn_costs (steps + 1,): of keeping so many.
    """
    width = layer.down.weight.shape[1]
    batch = ceil(width / STEPS)
    metric = metric_root(statistics.gram("ffn_output_gradient"))
    order, errors = elimination_path(
        in_metric(layer.down, metric), statistics.gram("ffn_neurons"), damping, batch=batch
    )
    gone = torch.arange(len(errors), device=errors.device) * batch
    return {
        "neuron_order": order,
        "ffn_widths": (width - gone).clamp(min=0),
        "ffn_costs": errors / 2,
    }


def metric_root(gradient_gram: Tensor) -> Tensor:
    """The Cholesky factor R of C = E[gᵀg], (d, d) in float64: ‖Rᵀe‖² = eᵀCe."""
    damped = gradient_gram.to(torch.float64, copy=True)
    scale = damped.diagonal().mean()
    damped.diagonal().add_(torch.where(scale > 0, JITTER * scale, 1.0))
    return torch.linalg.cholesky(damped, out=damped)


def in_metric(projection: Linear, root: Tensor) -> Tensor:
    """The projection's weight, (d, in), so multiplied that errors count by their norm."""
    return (root.mT @ projection.weight.double()).float()
