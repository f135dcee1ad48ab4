"""What the tensors of a layer's parts are called in the layer's module, dense or pruned.

A projection that is one matrix of its full width keeps its name. What stands in for one that pruning has changed lies
beside it, in one of three places: ``left`` and ``right`` hold the factors of a product, and ``narrow`` a matrix that
has lost rotary pairs or value neurons. See :mod:`distprune.modeling.pruned_projections` for why.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distprune.families import Family
from distprune.layers.expert_names import EXPERTS, ExpertNames
from distprune.layers.parts import (
    Attention,
    DecoderLayer,
    Experts,
    FeedForward,
    Linear,
    LowRank,
    Projection,
    outputs_of,
)
from distprune.layers.shapes import AttentionShape, ExpertsShape, LayerShape

#: How tensors of an attention and a feed-forward network that are not there are told from the rest of a layer.
LEFT, RIGHT, NARROW, BRANCH = "left", "right", "narrow", "branch"


@dataclass(frozen=True)
class LayerNames:
    """The names of one layer's tensors, and whose widths tell a narrow projection.

    Attributes:
        family: the names of modules.
        full: the attention that the layer's class is built with, heads aside: its heads are as wide as the class makes
            them; None for a layer without attention.
        experts: the names of its mixture of experts; None for a layer without one.
    """

    family: Family
    full: AttentionShape | None
    experts: ExpertNames | None = None

    # ---------------------------------------------------------------- from and to the state of a module

    def state_of(self, layer: DecoderLayer) -> dict[str, Tensor]:
        """The layer's tensors under the names of its module's state dict. Which rotary pairs are left is no tensor
        there."""
        state = {name: tensor for name, tensor in layer.rest.items() if not self._went_with_its_part(name, layer)}
        if layer.attention is not None:
            state |= self._attention_state(layer.attention)
        if isinstance(layer.ffn, Experts):
            state |= self._experts_state(layer.ffn)
        elif layer.ffn is not None:
            state |= self._ffn_state(layer.ffn, self.family.ffn)
        return state

    def layer_from_state(
        self, state: Mapping[str, Tensor], shape: LayerShape, rotary_pairs: Tensor | None = None
    ) -> DecoderLayer:
        """The inverse of :meth:`state_of`, for a layer of ``shape``."""
        state = dict(state)
        attention = None if shape.attention is None else self._attention(state, shape.attention, rotary_pairs)
        if isinstance(shape.ffn, ExpertsShape):
            return DecoderLayer(attention, self._experts(state, shape.ffn), state)
        ffn = None if shape.ffn is None else self._ffn(state, self.family.ffn)
        return DecoderLayer(attention, ffn, state)

    @property
    def router(self) -> str | None:
        """The module of a mixture's router; None where there is no mixture."""
        return None if self.experts is None else _path(self.family.ffn, self.experts.router)

    def is_of_router(self, name: str) -> bool:
        """Whether a tensor belongs to a mixture's router."""
        return self.router is not None and name.startswith(f"{self.router}.")

    def is_in_attention(self, name: str) -> bool:
        """Whether a tensor of the rest lies in an attention that is known: a norm of its queries."""
        return self.full is not None and name.startswith(f"{self.family.attention}.")

    def is_in_mixture(self, name: str) -> bool:
        """Whether one lies in a mixture of experts that is known: a gate of what its shared network gives."""
        return self.experts is not None and name.startswith(f"{self.family.ffn}.")

    def _went_with_its_part(self, name: str, layer: DecoderLayer) -> bool:
        return (layer.attention is None and self.is_in_attention(name)) or (
            layer.ffn is None and self.is_in_mixture(name)
        )

    def _attention_state(self, attention: Attention) -> dict[str, Tensor]:
        family, shape, parent = self.family, attention.shape, self.family.attention
        pieces = {
            family.query: (attention.query, self.narrows_pairs(shape)),
            family.key: (attention.key, self.narrows_pairs(shape)),
            family.value: (attention.value, self.narrows_values(shape)),
        }
        output = _state(parent, family.output, attention.output, self.narrows_values(shape))
        if family.qkv is None:
            return {**_states(parent, pieces), **output}
        if self.keeps_qkv(shape):
            fused = join_heads(
                [matrix(piece) for piece, _ in pieces.values()], shape.kv_heads if family.qkv.by_head else None
            )
            return {**_state(parent, family.qkv.name, fused), **output}
        return {**_states(parent, {name: (piece, True) for name, (piece, _) in pieces.items()}), **output}

    def _attention(self, state: dict[str, Tensor], shape: AttentionShape, pairs: Tensor | None) -> Attention:
        family, parent = self.family, self.family.attention
        if family.qkv is not None and self.keeps_qkv(shape):
            query: Projection
            key: Projection
            sizes = [
                shape.query_heads * shape.query_key_dim,
                *(shape.kv_heads * w for w in (shape.query_key_dim, shape.value_dim)),
            ]
            fused = _take_matrix(state, parent, family.qkv.name)
            query, key, value = split_heads(fused, sizes, shape.kv_heads if family.qkv.by_head else None)
        else:
            query, key = (_take(state, parent, name) for name in (family.query, family.key))
            value = _take_matrix(state, parent, family.value)
        output = _take(state, parent, family.output)
        return Attention(shape.query_heads, shape.kv_heads, query, key, value, output, pairs)

    def _experts_state(self, experts: Experts) -> dict[str, Tensor]:
        assert self.experts is not None and self.family.ffn is not None
        state = {_path(self.family.ffn, name): tensor for name, tensor in self.experts.state_of(experts).items()}
        if experts.shared is None:
            return state
        return state | self._ffn_state(experts.shared, _path(self.family.ffn, self.experts.shared))

    def _experts(self, state: dict[str, Tensor], shape: ExpertsShape) -> Experts:
        assert self.experts is not None and self.family.ffn is not None
        shared = None
        if shape.shared is not None:
            shared = self._ffn(state, _path(self.family.ffn, self.experts.shared))
        return self.experts.take(state, f"{self.family.ffn}.", shared, shape)

    def is_of_experts(self, name: str) -> bool:
        """Whether a tensor holds something of each expert, along its first dimension."""
        return self.experts is not None and name.startswith(f"{self.family.ffn}.{EXPERTS}.")

    def with_tensors(self, experts: Experts, tensors: Mapping[str, Tensor]) -> Experts:
        """A mixture whose experts were elsewhere with their tensors, by their names in the layer's module."""
        alone = replace(experts, shared=None, shared_count=None, elsewhere=None)
        return self._experts({**self._experts_state(alone), **tensors}, alone.shape)

    def _ffn_state(self, ffn: FeedForward, parent: str | None) -> dict[str, Tensor]:
        family = self.family
        state = _state(parent, family.down, ffn.down)
        if family.gate_up is not None and ffn.gate is not None:
            state |= _state(parent, family.gate_up.name, join_heads([ffn.gate, ffn.up]))
        else:
            state |= _state(parent, family.up, ffn.up)
            if family.gate is not None and ffn.gate is not None:
                state |= _state(parent, family.gate, ffn.gate)
        return state | _state(parent, BRANCH, ffn.branch) if ffn.branch is not None else state

    def _ffn(self, state: dict[str, Tensor], parent: str | None) -> FeedForward:
        family, gate = self.family, None
        if family.gate_up is not None:
            fused = _take_matrix(state, parent, family.gate_up.name)
            gate, up = split_heads(fused, [outputs_of(fused) // 2] * 2)
        else:
            up = _take_matrix(state, parent, family.up)
            if family.gate is not None:
                gate = _take_matrix(state, parent, family.gate)
        has_branch = f"{_path(parent, RIGHT, BRANCH)}.weight" in state
        branch = _take(state, parent, BRANCH) if has_branch else None
        assert branch is None or isinstance(branch, LowRank)
        return FeedForward(gate, up, _take_matrix(state, parent, family.down), branch)

    # ---------------------------------------------------------------- which projections stand in for others

    def narrows_pairs(self, shape: AttentionShape) -> bool:
        """Whether queries and keys are narrower than the layer's class makes them."""
        return self.full is not None and shape.query_key_dim < self.full.query_key_dim

    def narrows_values(self, shape: AttentionShape) -> bool:
        """Whether values are narrower than the layer's class makes them."""
        return self.full is not None and shape.value_dim < self.full.value_dim

    def keeps_qkv(self, shape: AttentionShape) -> bool:
        """Whether queries, keys and values are still one projection, where the family has one."""
        factored = shape.query_rank is not None or shape.key_rank is not None
        return not (factored or self.narrows_pairs(shape) or self.narrows_values(shape))


def _path(*names: str | None) -> str:
    return ".".join(name for name in names if name)


def _states(parent: str | None, pieces: Mapping[str, tuple[Projection, bool]]) -> dict[str, Tensor]:
    return {
        key: tensor
        for name, (piece, is_narrow) in pieces.items()
        for key, tensor in _state(parent, name, piece, is_narrow).items()
    }


def _state(parent: str | None, name: str, projection: Projection, is_narrow: bool = False) -> dict[str, Tensor]:
    if isinstance(projection, LowRank):
        left = _path(parent, LEFT, name)
        state = {f"{_path(parent, RIGHT, name)}.weight": projection.right, f"{left}.weight": projection.left}
        return state if projection.bias is None else state | {f"{left}.bias": projection.bias}
    path = _path(parent, NARROW, name) if is_narrow else _path(parent, name)
    state = {f"{path}.weight": projection.weight}
    return state if projection.bias is None else state | {f"{path}.bias": projection.bias}


def _take(state: dict[str, Tensor], parent: str | None, name: str) -> Projection:
    """A projection out of a module's state, wherever it stands."""
    if (right := state.pop(f"{_path(parent, RIGHT, name)}.weight", None)) is not None:
        left = _path(parent, LEFT, name)
        return LowRank(right, state.pop(f"{left}.weight"), state.pop(f"{left}.bias", None))
    narrow = _path(parent, NARROW, name)
    path = narrow if f"{narrow}.weight" in state else _path(parent, name)
    return Linear(state.pop(f"{path}.weight"), state.pop(f"{path}.bias", None))


def _take_matrix(state: dict[str, Tensor], parent: str | None, name: str) -> Linear:
    return matrix(_take(state, parent, name))


def matrix(projection: Projection) -> Linear:
    """A projection that is known to be one matrix."""
    if not isinstance(projection, Linear):
        raise TypeError("the projection is a product of two factors")
    return projection


# ---------------------------------------------------------------- projections that are one matrix


def join_heads(pieces: list[Linear], groups: int | None = None) -> Linear:
    """One linear map of the outputs of several: one after the other, or where ``groups`` are given group by group."""

    def joined(tensors: list[Tensor]) -> Tensor:
        if groups is None:
            return torch.cat(tensors)
        return torch.cat([tensor.unflatten(0, (groups, -1)) for tensor in tensors], dim=1).flatten(0, 1)

    biases = [piece.bias for piece in pieces if piece.bias is not None]
    return Linear(joined([piece.weight for piece in pieces]), joined(biases) if biases else None)


def split_heads(fused: Linear, sizes: list[int], groups: int | None = None) -> list[Linear]:
    """The inverse of :func:`join_heads`, for pieces with so many outputs."""

    def pieces(tensor: Tensor) -> list[Tensor]:
        if groups is None:
            return [piece.contiguous() for piece in tensor.split(sizes)]
        of_group = tensor.unflatten(0, (groups, -1)).split([size // groups for size in sizes], dim=1)
        return [piece.flatten(0, 1) for piece in of_group]

    biases = [None] * len(sizes) if fused.bias is None else pieces(fused.bias)
    return [Linear(weight, bias) for weight, bias in zip(pieces(fused.weight), biases, strict=True)]


# ---------------------------------------------------------------- dtypes


def origin_of(name: str, originals: Container[str], family: Family) -> str:
    """Whose dtype a tensor of a pruned layer takes, among the names of the original layer's state.

    That is its own namesake's; that of the matrix which a factor or a narrow matrix replaces, an added bias belongs to
    or, for the branch beside the feed-forward network, gives the network's output.
    """
    for candidate in _origins(name, family):
        if candidate in originals:
            return candidate
    raise KeyError(name)


def _origins(name: str, family: Family) -> Iterator[str]:
    yield name
    module, _, kind = name.rpartition(".")
    for place in (RIGHT, LEFT, NARROW):
        module = module.replace(f".{place}.", ".")
    parent, _, own = module.rpartition(".")
    replaced = {BRANCH: family.down}
    if family.qkv is not None:
        replaced |= dict.fromkeys((family.query, family.key, family.value), family.qkv.name)
    for path in (module, _path(parent, replaced.get(own, own))):
        yield f"{path}.{kind}"
        yield f"{path}.weight"


def stored_like(layer: DecoderLayer, original: DecoderLayer, names: LayerNames) -> DecoderLayer:
    """The layer in the dtypes of another, which it was made from: see :func:`origin_of`."""
    dtypes = {name: tensor.dtype for name, tensor in names.state_of(original).items()}
    pairs = None if layer.attention is None else layer.attention.rotary_pairs
    state = {
        name: tensor.to(dtypes[origin_of(name, dtypes, names.family)]) for name, tensor in names.state_of(layer).items()
    }
    return names.layer_from_state(state, layer.shape, pairs)
