"""What checkpoints of an earlier version said of their layers, as the layout ``free`` says it.

Those had a configuration class of their own, in which a layer's shape had zeros for parts that were not there, and
tensors' names of their own: ``calibration`` for the linear branch, narrow matrices under the names of whole ones, and
the rotary pairs in a tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from distprune.export.said_shapes import Said, shape_of
from distprune.layers.architecture import Architecture
from distprune.layers.names import BRANCH

#: What only those configurations have.
OWN_FIELDS = ("base_model_type", "layer_shapes")
#: How they called what transformers' configurations of the base say otherwise, or not at all.
OTHER_FIELDS = ("attention_output_bias", "query_key_norm", "pruned_hidden_act", "auto_map", "architectures")
PAIRS = "self_attn.rotary_pairs"


def is_earlier(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of such a checkpoint."""
    return all(name in config for name in OWN_FIELDS)


def base_config(config: Mapping[str, Any]) -> PreTrainedConfig:
    """The configuration of the model that was pruned."""
    fields = {name: value for name, value in config.items() if name not in (*OWN_FIELDS, *OTHER_FIELDS, "model_type")}
    fields["hidden_act"] = config.get("pruned_hidden_act", config["hidden_act"])
    if fields.get("sliding_window") is not None:
        fields["use_sliding_window"] = True  # or else Qwen's configurations forget the window
    return AutoConfig.for_model(config["base_model_type"], **fields)


def said_shapes(config: Mapping[str, Any], pairs: Mapping[int, Tensor]) -> list[Said]:
    """The layers' shapes; ``pairs`` are the rotary pairs of layers that have lost some, by number."""
    return [
        {"attention": _attention(config, old, pairs.get(index)), "ffn": _ffn(config, old)}
        for index, old in enumerate(config["layer_shapes"])
    ]


def _attention(config: Mapping[str, Any], old: Mapping[str, Any], pairs: Tensor | None) -> dict[str, Any] | None:
    if not old["query_heads"]:
        return None
    names = ("query_heads", "kv_heads", "query_key_dim", "value_dim")
    ranks = ("query_rank", "key_rank", "output_rank")
    return {
        **{name: old[name] for name in names},
        **{name: old.get(name) for name in ranks},
        "output_bias": bool(old.get("output_bias") or config.get("attention_output_bias")),
        "rotary_pairs": None if pairs is None else pairs.tolist(),
    }


def _ffn(config: Mapping[str, Any], old: Mapping[str, Any]) -> dict[str, Any] | None:
    if not old["ffn_width"]:
        return None
    down_bias = bool(old.get("down_bias") or config.get("mlp_bias"))
    return {"width": old["ffn_width"], "branch_rank": old.get("calibration_rank"), "down_bias": down_bias}


def converted_layer(
    architecture: Architecture, index: int, state: Mapping[str, Tensor], said: Said
) -> dict[str, Tensor]:
    """A layer's tensors under the names that they have now.

    Args:
        architecture: of the base.
        index: which layer of the model it is.
        state: the layer's tensors by the names that they had in it.
        said: its shape, one of :func:`said_shapes`.
    """
    names = architecture.names(index)
    renamed = {name.replace(".calibration.", f".{BRANCH}."): tensor for name, tensor in state.items() if name != PAIRS}
    converted = names.state_of(names.layer_from_state(renamed, shape_of(said), state.get(PAIRS)))
    # The norm of a part that is not there was not there either; transformers' layers have all of theirs.
    like = next(iter(renamed.values()), torch.empty(0))
    absent = [name for part, name in (("attention", "self_attn."), ("ffn", "mlp.")) if said[part] is None]
    for name, dims in architecture.rest_tensors(index).items():
        if name not in converted and not name.startswith(tuple(absent)):
            converted[name] = torch.ones(dims, dtype=like.dtype)
    return converted
