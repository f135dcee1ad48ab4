"""One decoder layer as a value: its parts, and the tensors beside them that are carried through.

Everything that prunes is a function from one :class:`DecoderLayer` to another. Parts carry no tensor names: those are
known to the model families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distprune.layers.shapes import AttentionShape, ExpertsShape, FeedForwardShape, LayerShape

T = TypeVar("T")


@dataclass(frozen=True)
class Linear:
    """x (.., in) -> x Wᵀ + b. ``weight`` is (out, in) as PyTorch stores it, ``bias`` (out,) or None."""

    weight: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True)
class LowRank:
    """x (.., in) -> x Rᵀ Lᵀ + b with ``right`` R (rank, in), ``left`` L (out, rank) and ``bias`` (out,) or None."""

    right: Tensor
    left: Tensor
    bias: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.right.shape[0]


Projection = Linear | LowRank


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention.

    d is the hidden size, h and g the numbers of query heads and KV groups, p and v the widths per head of queries and
    keys and of values.
    """

    query_heads: int
    kv_heads: int
    query: Projection  # d -> h·p; wider where a family's queries carry gates along
    key: Projection  # d -> g·p
    value: Linear  # d -> g·v
    output: Projection  # h·v -> d
    # (g, p/2) integers, ascending: the original head's rotary pairs that each KV group has kept; None where all are.
    rotary_pairs: Tensor | None = None

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            query_key_dim=outputs_of(self.key) // self.kv_heads,
            value_dim=outputs_of(self.value) // self.kv_heads,
            query_rank=rank_of(self.query),
            key_rank=rank_of(self.key),
            output_rank=rank_of(self.output),
            output_bias=self.output.bias is not None,
        )


@dataclass(frozen=True)
class FeedForward:
    """A feed-forward network of f neurons, with a gate or without."""

    gate: Linear | None  # d -> f
    up: Linear  # d -> f
    down: Linear  # f -> d
    branch: LowRank | None = None  # d -> d, added to the network's output

    @property
    def inputs(self) -> tuple[Linear, ...]:
        """The projections that read the network's input."""
        return (self.up,) if self.gate is None else (self.gate, self.up)

    @property
    def shape(self) -> FeedForwardShape:
        return FeedForwardShape(
            width=outputs_of(self.up),
            branch_rank=rank_of(self.branch),
            down_bias=self.down.bias is not None,
            is_gated=self.gate is not None,
        )


@dataclass(frozen=True)
class Experts:
    """A mixture of E experts, feed-forward networks of f neurons, of which a router chooses some for each token.

    m is 2 where a gate multiplies what the up projection gives, and 1 where there is none.
    """

    router: Linear  # d -> E
    inputs: Tensor  # (E, m, f, d): of each expert the gate, if there is one, and the up projection
    down: Tensor  # (E, d, f)
    input_bias: Tensor | None = None  # (E, m, f)
    down_bias: Tensor | None = None  # (E, d)
    correction: Tensor | None = None  # (E,), added to the router's scores when it chooses
    shared: FeedForward | None = None  # every token passes through it besides
    # Where the shared network is so many experts, each as wide as the others: how many.
    shared_count: int | None = None
    # How many experts a token is sent to, of how many groups the router chooses some first, and how few it can do with.
    per_token: int = 1
    groups: int = 1
    fewest: int = 1
    # (E,) integers, where experts are read a chunk at a time: which of the checkpoint's they are. Their own tensors are
    # on the meta device then. None where all are here.
    elsewhere: Tensor | None = None

    def expert(self, number: int) -> FeedForward:
        """One expert; its tensors are views."""
        *gate, up = (
            Linear(weight, None if self.input_bias is None else self.input_bias[number, place])
            for place, weight in enumerate(self.inputs[number])
        )
        down = Linear(self.down[number], None if self.down_bias is None else self.down_bias[number])
        return FeedForward(gate[0] if gate else None, up, down)

    @property
    def shape(self) -> ExpertsShape:
        count, projections, width, _ = self.inputs.shape
        shared = None if self.shared is None or self.shared_count else self.shared.shape.width
        return ExpertsShape(
            count,
            width,
            shared,
            self.shared_count,
            per_token=self.per_token,
            groups=self.groups,
            fewest=self.fewest,
            is_gated=projections == 2,
        )


@dataclass(frozen=True)
class DecoderLayer:
    """A decoder layer: the parts that pruning knows, and everything else.

    Attributes:
        attention: None where it is of a kind that is not known (then its tensors are in ``rest``), or was removed.
        ffn: likewise; a feed-forward network, or a mixture of them.
        rest: tensors by their names in the layer's module that no part holds: norms, and what is carried through as
            it is.
    """

    attention: Attention | None
    ffn: FeedForward | Experts | None
    rest: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def shape(self) -> LayerShape:
        attention = None if self.attention is None else self.attention.shape
        return LayerShape(attention, None if self.ffn is None else self.ffn.shape)

    def to(self, *args: Any, **kwargs: Any) -> DecoderLayer:
        """The same layer with every tensor moved or cast as ``torch.Tensor.to`` does; indices are only moved."""
        return map_tensors(self, lambda tensor: _to(tensor, *args, **kwargs))


def map_tensors(value: T, change: Callable[[Tensor], Tensor]) -> T:
    """A layer, or a part of one, with every tensor changed."""
    return cast(T, _mapped(value, change))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _mapped(each, change) for name, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{own.name: _mapped(getattr(value, own.name), change) for own in fields(value)})
    return value


def _to(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if tensor.is_meta:  # what is elsewhere stays there
        return tensor.to(torch.empty(0, dtype=tensor.dtype).to(*args, **kwargs).dtype)
    if tensor.is_floating_point():
        return tensor.to(*args, **kwargs)
    device = tensor.new_empty(0).to(*args, **kwargs).device
    return tensor.to(device, copy=kwargs.get("copy", False))


def outputs_of(projection: Projection) -> int:
    """How wide a projection's output is."""
    return (projection.weight if isinstance(projection, Linear) else projection.left).shape[0]


def rank_of(projection: Projection | None) -> int | None:
    """The rank of a factored projection, None for any other."""
    return projection.rank if isinstance(projection, LowRank) else None


def slice_linear(linear: Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Linear:
    """The linear map of the given output ``rows`` (with their biases) and input ``columns``, 1-D index tensors."""
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    return Linear(weight.contiguous(), bias)


def keep_experts(experts: Experts, numbers: Tensor) -> Experts:
    """The mixture with the given experts, ascending indices (kept,); the router no longer knows the others."""

    def kept(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.index_select(0, numbers.to(tensor.device))

    return replace(
        experts,
        router=slice_linear(experts.router, rows=numbers),
        inputs=experts.inputs.index_select(0, numbers.to(experts.inputs.device)),
        down=experts.down.index_select(0, numbers.to(experts.down.device)),
        input_bias=kept(experts.input_bias),
        down_bias=kept(experts.down_bias),
        correction=kept(experts.correction),
        elsewhere=kept(experts.elsewhere),
    )
