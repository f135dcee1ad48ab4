"""What a model family is to distprune: names in the module tree of its decoder layers, and a few flags."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fused:
    """Projections that read the same input and are one matrix.

    Attributes:
        name: of the linear map in the module that it belongs to.
        by_head: whether the outputs of a head's query, key and value lie together; else each projection's do.
    """

    name: str
    by_head: bool = False


@dataclass(frozen=True)
class Family:
    """Where the parts of a family's decoder layers are. The defaults are the names that most families have.

    Attributes:
        attention: the attention's name in the layer.
        query, key, value, output: its projections' names in it.
        qkv: the one projection that stands in for the first three, if there is one.
        ffn: the feed-forward network's name in the layer; None where its projections are the layer's own.
        gate: the gate's name in the network; None where there is no gate.
        up, down: its other projections' names.
        gate_up: the one projection that stands in for gate and up, if there is one.
        heads, kv_heads, head_dim, width: what the configuration calls the sizes that its layer's class is built from;
            None for what it doesn't say apart.
        mixes_pairs: whether the rotary embedding turns the coordinates i and i + width / 2 of every head, and nothing
            else but linear maps lies between hidden states and scores. None: found out from its code.
        gives_scores: whether a mixture of experts gives its router's scores beside its output.
    """

    attention: str = "self_attn"
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    qkv: Fused | None = None
    ffn: str | None = "mlp"
    gate: str | None = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    gate_up: Fused | None = None
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    head_dim: str | None = "head_dim"
    width: str = "intermediate_size"
    mixes_pairs: bool | None = None
    gives_scores: bool = False
