"""The shapes of a decoder layer's parts: widths, ranks and added biases. None stands for a part that is not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class AttentionShape:
    """The shape of grouped-query attention.

    Attributes:
        query_heads: query heads, a multiple of ``kv_heads``.
        kv_heads: key/value heads.
        query_key_dim: width of one query or key head, two for each rotary pair that it keeps.
        value_dim: width of one value head.
        query_rank: rank of the factored query projection, None where it is one matrix.
        key_rank: rank of the factored key projection, None where it is one matrix.
        output_rank: rank of the factored output projection, None where it is one matrix.
        output_bias: whether the output projection has a bias.

    Raises:
        ValueError: a width or a rank is not a positive integer, or the query heads don't divide into the KV heads.
    """

    query_heads: int
    kv_heads: int
    query_key_dim: int
    value_dim: int
    query_rank: int | None = None
    key_rank: int | None = None
    output_rank: int | None = None
    output_bias: bool = False

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.query_heads % self.kv_heads:
            raise ValueError(f"query_heads ({self.query_heads}) must be a multiple of kv_heads ({self.kv_heads}).")

    @property
    def heads_per_group(self) -> int:
        """Query heads that share a KV head."""
        return self.query_heads // self.kv_heads

    @property
    def is_factored(self) -> bool:
        """Whether a projection is stored as two factors. Attention that is so before it is pruned is left alone."""
        return any(rank is not None for rank in (self.query_rank, self.key_rank, self.output_rank))


@dataclass(frozen=True)
class FeedForwardShape:
    """The shape of a feed-forward network.

    Attributes:
        width: its neurons.
        branch_rank: rank of the linear branch beside it, None where there is none.
        down_bias: whether the down projection has a bias.
        is_gated: whether a gate multiplies what the up projection gives.

    Raises:
        ValueError: a width or a rank is not a positive integer.
    """

    width: int
    branch_rank: int | None = None
    down_bias: bool = False
    is_gated: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclass(frozen=True)
class ExpertsShape:
    """The shape of a mixture of experts.

    Attributes:
        count: its experts.
        width: neurons of each.
        shared_width: neurons of what every token passes through beside them, None where there is none or where
            ``shared_count`` says it.
        shared_count: of families whose shared experts are as wide as the others, how many there are.
        per_token: how many experts a token is sent to.
        groups: of how many groups the router chooses some first; all have as many experts.
        fewest: of experts that the router can choose from.
        is_gated: whether a gate multiplies what the up projection gives.

    Raises:
        ValueError: a number is not a positive integer.
    """

    count: int
    width: int
    shared_width: int | None = None
    shared_count: int | None = None
    per_token: int = 1
    groups: int = 1
    fewest: int = 1
    is_gated: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self)

    @property
    def shared(self) -> FeedForwardShape | None:
        """The shape of the network that every token passes through."""
        width = self.shared_count * self.width if self.shared_count else self.shared_width
        return None if width is None else FeedForwardShape(width, is_gated=self.is_gated)


@dataclass(frozen=True)
class LayerShape:
    """The shapes of a layer's parts.

    Attributes:
        attention: None where the layer has none that is known, be it that it never had or that pruning took it.
        ffn: likewise; of one feed-forward network or of a mixture of experts.
    """

    attention: AttentionShape | None
    ffn: FeedForwardShape | ExpertsShape | None

    def with_attention(self, **changes: Any) -> LayerShape:
        """The shape with some of its attention's fields changed; the shape itself where it has no attention."""
        return self if self.attention is None else replace(self, attention=replace(self.attention, **changes))

    def with_ffn(self, **changes: Any) -> LayerShape:
        """The shape with some of its feed-forward network's fields changed; the shape itself where it has none."""
        return self if self.ffn is None else replace(self, ffn=replace(self.ffn, **changes))

    def to_json(self) -> dict[str, Any]:
        """The shape as JSON can hold it, for :meth:`from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, said: Mapping[str, Any]) -> LayerShape:
        """The shape that :meth:`to_json` said.

        Raises:
            TypeError, ValueError: it is not one.
        """
        attention, ffn = said["attention"], said["ffn"]
        return cls(attention and AttentionShape(**attention), ffn and ffn_shape_of(ffn))


def ffn_shape_of(said: Mapping[str, Any]) -> FeedForwardShape | ExpertsShape:
    """The shape of a feed-forward network, or of a mixture, whose fields are said."""
    return ExpertsShape(**said) if "count" in said else FeedForwardShape(**said)


#: Ends of the names of numbers that may be absent.
OPTIONAL = ("_rank", "shared_width", "shared_count")


def _check_numbers(shape: AttentionShape | FeedForwardShape | ExpertsShape) -> None:
    for name, value in vars(shape).items():
        if name.endswith("_bias") or name.startswith("is_"):
            sound, kind = isinstance(value, bool), "true or false"
        else:
            sound = (value is None and name.endswith(OPTIONAL)) or (type(value) is int and value > 0)
            kind = "a positive integer"
        if not sound:
            raise ValueError(f"{name} must be {kind}, got {value!r}.")


@dataclass(frozen=True)
class Removable:
    """What of a dense layer may go: what its family's classes can be built without, or what stands in for it can.

    Attributes:
        heads: KV groups, and query heads as many from each.
        values: value neurons, as many from each head.
        pairs: rotary pairs of queries and keys.
        factors: query, key and output projections may become products of two factors.
        neurons: neurons of the feed-forward network, or as many of each expert.
        experts: whole experts.
        branch: whether a linear branch may stand beside the feed-forward network.
        attention: attention as a whole.
        ffn: the feed-forward network as a whole.
    """

    heads: bool = False
    values: bool = False
    pairs: bool = False
    factors: bool = False
    neurons: bool = False
    experts: bool = False
    branch: bool = False
    attention: bool = False
    ffn: bool = False
