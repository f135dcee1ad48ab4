"""The families whose decoder layers don't carry the common names, by ``model_type``."""

from __future__ import annotations

from distprune.families.family import Family, Fused

_FUSED_GATE_UP = Family(gate_up=Fused("gate_up_proj"))

TABLES: dict[str, Family] = {
    "phi3": Family(qkv=Fused("qkv_proj"), gate_up=Fused("gate_up_proj")),
    "glm": _FUSED_GATE_UP,
    "glm4": _FUSED_GATE_UP,
    "nemotron": Family(gate=None),
    "arcee": Family(gate=None),
    "starcoder2": Family(gate=None, up="c_fc", down="c_proj"),
    "phi": Family(output="dense", gate=None, up="fc1", down="fc2"),
    "gpt_neox": Family(
        attention="attention",
        qkv=Fused("query_key_value", by_head=True),
        output="dense",
        gate=None,
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        kv_heads=None,
        head_dim=None,
    ),
    "llama4_text": Family(ffn="feed_forward", width="intermediate_size_mlp"),
    "gpt_oss": Family(gives_scores=True),
    "granitemoe": Family(ffn="block_sparse_moe"),
    "granitemoeshared": Family(ffn="block_sparse_moe"),
    "granitemoehybrid": Family(ffn="block_sparse_moe"),
    "opt": Family(
        output="out_proj",
        ffn=None,
        gate=None,
        up="fc1",
        down="fc2",
        kv_heads=None,
        head_dim=None,
        width="ffn_dim",
    ),
}

COMMON = Family()


def family_of(model_type: str) -> Family:
    """A family's names; the common ones where none are written down."""
    return TABLES.get(model_type, COMMON)
