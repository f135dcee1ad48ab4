"""Where gates can stand in a layer: on the diagonal between two matrices, of which a closed one takes a column of the
first and a row of the second."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from distprune.layers.parts import Attention, Experts, FeedForward, Linear, LowRank
from distprune.layers.shapes import ExpertsShape, FeedForwardShape
from distprune.layers.sites import Site
from distprune.methods.networks import OF_EXPERTS, OF_SHARED
from distprune.statistics import LayerStatistics

#: The gates between the factors of query and key projections, (rank,), between values and output projection, (g, v),
#: and between a feed-forward network's projections, (f,).
QUERY, KEY, VALUES, NEURON_GATES = "query", "key", "values", "neurons"
EXPERT_GATES, SHARED_GATES = OF_EXPERTS + NEURON_GATES, OF_SHARED + NEURON_GATES

# ---------------------------------------------------------------- two factors in the place of a projection


def break_even_rank(projection: Linear) -> int:
    """The greatest rank at which two factors take no more than the projection."""
    return projection.weight.numel() // sum(projection.weight.shape)


def factored(projection: Linear, left: Tensor) -> LowRank:
    """Two factors, the left one given, (out, rank) with orthonormal columns: what it is of the projection's outputs."""
    return LowRank(right=left.mT @ projection.weight.float(), left=left, bias=projection.bias)


def with_gated_ranks(projection: LowRank, gates: Tensor) -> LowRank:
    """The factors with gates between them, (rank,)."""
    return replace(projection, left=projection.left * gates)


def keep_ranks(projection: LowRank, kept: Tensor) -> LowRank:
    """The factors without what all but some gates stand in front of, indices (kept,)."""
    left, right = projection.left.index_select(1, kept), projection.right.index_select(0, kept)
    return replace(projection, left=left.contiguous(), right=right)


def rank_gradients(projection: LowRank, statistics: LayerStatistics, output: Site, given: Site) -> Tensor:
    """The loss's gradient in every gate between two factors, (rank,), summed over the tokens."""
    inner = projection.left.mT.float() @ statistics.cross(output.gradient, given)
    return (inner * projection.right.float()).sum(dim=1) * statistics.tokens(given)


# ---------------------------------------------------------------- values, neurons


def with_gated_values(attention: Attention, gates: Tensor) -> Attention:
    """Attention whose output projection reads every value times its gate, (g, v)."""
    assert isinstance(attention.output, Linear)
    columns = gates.repeat_interleave(attention.shape.heads_per_group, dim=0).flatten()
    return replace(attention, output=with_scaled_columns(attention.output, columns))


def with_gated_neurons(ffn: FeedForward, gates: Tensor) -> FeedForward:
    """A network whose down projection reads every neuron times its gate, (f,)."""
    return replace(ffn, down=with_scaled_columns(ffn.down, gates))


def with_gated_experts(experts: Experts, gates: Tensor) -> Experts:
    """The same of every expert of a mixture, (E, f)."""
    return replace(experts, down=experts.down.float() * gates[:, None])


def with_scaled_columns(linear: Linear, scales: Tensor) -> Linear:
    """The linear map of its input times ``scales``, (in,), in float32."""
    return replace(linear, weight=linear.weight.float() * scales)


def column_gradients(weight: Tensor, statistics: LayerStatistics, output: Site, given: Site) -> Tensor:
    """The loss's gradient in a scale of every column of a weight, (in,), summed over the tokens."""
    gradients = weight.float() * statistics.cross(output.gradient, given)
    return gradients.sum(dim=0) * statistics.tokens(given)


def neuron_gates(shape: FeedForwardShape | ExpertsShape | None) -> list[str]:
    """The names of the gates of neurons that may go: of a network, or of all experts and what narrows with them."""
    if not isinstance(shape, ExpertsShape):
        return [] if shape is None else [NEURON_GATES]
    return [EXPERT_GATES, SHARED_GATES] if shape.shared_count else [EXPERT_GATES]


def named_by_network(ffn: FeedForward | Experts, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """What was found of each network, in their order, by the names of its gates."""
    if isinstance(ffn, FeedForward):
        return {NEURON_GATES: values[0]}
    named = {EXPERT_GATES: torch.stack([*values[: ffn.shape.count]])}
    return named if ffn.shared is None else {**named, SHARED_GATES: values[-1]}
