"""One decoder layer as a value: its tensors by their role, and the geometry that follows from them.

Everything that prunes is a function from one ``DecoderLayer`` to another. The roles carry no tensor names: those are
known to the model families (what a checkpoint calls them) and to :func:`state_of` (what our module calls them).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, fields, replace

from torch import Tensor

from distprune.modeling import ROTARY_PAIRS, LayerShape


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


@dataclass(frozen=True)
class DecoderLayer:
    """A pre-norm decoder layer with grouped-query attention and a gated FFN, or without one of them or both.

    d is the hidden size, h and g the numbers of query heads and KV groups, p and v the widths per head of queries and
    keys and of values, f the FFN width. What belongs to an absent part is None, and h and g are 0 without attention.
    """

    query_heads: int
    kv_heads: int
    attention_norm: Tensor | None  # (d,)
    query: Linear | LowRank | None  # d -> h·p
    key: Linear | LowRank | None  # d -> g·p
    value: Linear | None  # d -> g·v
    output: Linear | LowRank | None  # h·v -> d
    ffn_norm: Tensor | None  # (d,)
    gate: Linear | None  # d -> f
    up: Linear | None  # d -> f
    down: Linear | None  # f -> d
    query_norm: Tensor | None = None  # (p,), RMS norm of each query head where the family has one
    key_norm: Tensor | None = None  # (p,)
    # (g, p/2) integers, ascending: the original head's rotary pairs that each KV group has kept; None where all are.
    rotary_pairs: Tensor | None = None
    calibration: LowRank | None = None  # d -> d, added to the FFN's output

    @property
    def shape(self) -> LayerShape:
        return LayerShape(
            query_heads=self.query_heads,
            kv_heads=self.kv_heads,
            query_key_dim=_width(self.query) // self.query_heads if self.query else 0,
            value_dim=_width(self.value) // self.kv_heads if self.value else 0,
            ffn_width=_width(self.gate) if self.gate else 0,
            query_rank=_rank(self.query),
            key_rank=_rank(self.key),
            output_rank=_rank(self.output),
            calibration_rank=_rank(self.calibration),
            output_bias=self.output is not None and self.output.bias is not None,
            down_bias=self.down is not None and self.down.bias is not None,
        )

    def to(self, *args, **kwargs) -> DecoderLayer:
        """The same layer with every tensor moved or cast as ``torch.Tensor.to`` does; indices are only moved."""
        return _map_tensors(self, lambda tensor: _to(tensor, *args, **kwargs))


def _to(tensor: Tensor, *args, **kwargs) -> Tensor:
    if tensor.is_floating_point():
        return tensor.to(*args, **kwargs)
    device = tensor.new_empty(0).to(*args, **kwargs).device
    return tensor.to(device, copy=kwargs.get("copy", False))


def _map_tensors(value, change: Callable[[Tensor], Tensor]):
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (Linear, LowRank, DecoderLayer)):
        return replace(value, **{f.name: _map_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


def _width(projection: Linear | LowRank) -> int:
    return (projection.weight if isinstance(projection, Linear) else projection.left).shape[0]


def _rank(projection: Linear | LowRank | None) -> int | None:
    return projection.rank if isinstance(projection, LowRank) else None


# Role -> name inside our decoder-layer module (distprune.modeling), whose state this converts from and to.
_PROJECTIONS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "calibration": "mlp.calibration",
}
_NORMS = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "query_norm": "self_attn.q_norm",
    "key_norm": "self_attn.k_norm",
}


def factor_names(name: str) -> tuple[str, str]:
    """What the right and the left factor of a projection are called: "self_attn.right.q_proj" and so on."""
    parent, own = name.rsplit(".", 1)
    return f"{parent}.right.{own}", f"{parent}.left.{own}"


def state_of(layer: DecoderLayer) -> dict[str, Tensor]:
    """The layer's tensors under the names of our decoder-layer module's state dict."""
    state = {f"{name}.weight": getattr(layer, role) for role, name in _NORMS.items()}
    state[ROTARY_PAIRS] = layer.rotary_pairs
    for role, name in _PROJECTIONS.items():
        match getattr(layer, role):
            case Linear(weight, bias):
                state |= {f"{name}.weight": weight, f"{name}.bias": bias}
            case LowRank(right, left, bias):
                first, second = factor_names(name)
                state |= {f"{first}.weight": right, f"{second}.weight": left, f"{second}.bias": bias}
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def layer_from_state(state: Mapping[str, Tensor], shape: LayerShape) -> DecoderLayer:
    """The inverse of :func:`state_of` for a layer with ``shape``'s head counts."""

    def projection(name: str) -> Linear | LowRank | None:
        right, left = factor_names(name)
        if f"{right}.weight" in state:
            return LowRank(state[f"{right}.weight"], state[f"{left}.weight"], state.get(f"{left}.bias"))
        if f"{name}.weight" in state:
            return Linear(state[f"{name}.weight"], state.get(f"{name}.bias"))
        return None

    return DecoderLayer(
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        **{role: state.get(f"{name}.weight") for role, name in _NORMS.items()},
        **{role: projection(name) for role, name in _PROJECTIONS.items()},
        rotary_pairs=state.get(ROTARY_PAIRS),
    )


def stored_like(layer: DecoderLayer, original: DecoderLayer) -> DecoderLayer:
    """The layer in the dtypes of another, which it was made from: see :func:`origin_of`. Indices stay integers."""
    dtypes = {name: tensor.dtype for name, tensor in state_of(original).items()}
    state = {
        name: tensor.to(dtypes[origin_of(name, dtypes)]) if tensor.is_floating_point() else tensor
        for name, tensor in state_of(layer).items()
    }
    return layer_from_state(state, layer.shape)


def origin_of(name: str, originals: Container[str]) -> str:
    """Whose dtype a tensor of a pruned layer takes, among the names of the original layer's state.

    That is its own namesake's; that of the matrix which a factor replaces, an added bias belongs to or, for the branch
    beside the FFN, gives the FFN's output.
    """
    if name in originals:
        return name
    module, _, kind = name.rpartition(".")
    module = module.replace(".right.", ".").replace(".left.", ".")  # see factor_names
    if module == _PROJECTIONS["calibration"]:
        module = _PROJECTIONS["down"]
    return f"{module}.{kind}" if f"{module}.{kind}" in originals else f"{module}.weight"


def slice_linear(linear: Linear, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Linear:
    """Keep the given output ``rows`` (with their biases) and input ``columns``, each a 1-D index tensor."""
    weight, bias = linear.weight, linear.bias
    if rows is not None:
        weight = weight.index_select(0, rows)
        bias = None if bias is None else bias.index_select(0, rows)
    if columns is not None:
        weight = weight.index_select(1, columns)
    return Linear(weight.contiguous(), bias)


__all__ = [
    "DecoderLayer",
    "LayerShape",
    "Linear",
    "LowRank",
    "factor_names",
    "layer_from_state",
    "origin_of",
    "slice_linear",
    "state_of",
    "stored_like",
]
