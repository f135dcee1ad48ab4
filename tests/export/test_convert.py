"""Checkpoints of an earlier version: what they were like is written out here by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layer_edits import (
    factored,
    fewer_groups,
    fewer_neurons,
    fewer_pairs,
    in_turn,
    narrower_values,
    with_biases,
    with_branch,
    without_attention,
    without_ffn,
)
from pruned_checkpoints import write_pruned
from safetensors.torch import load_file, save_file
from small_models import small_model

from distprune.errors import InputError
from distprune.export.convert import convert
from distprune.modeling import load

EDITS = {
    0: in_turn(fewer_pairs(2), narrower_values(5), fewer_neurons(40)),
    1: in_turn(narrower_values(6), factored(query=9, key=7, output=11), with_branch(3)),
    2: without_attention,
    3: in_turn(fewer_groups(2), with_biases),
    4: without_ffn,
}
CASES = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 3},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 6},
}
WIDTHS = ("query_heads", "kv_heads", "query_key_dim", "value_dim")


def as_earlier(folder: Path, layers: int) -> None:
    """Rewrite a checkpoint as an earlier version wrote it."""
    config, state = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    overrides = config.pop("per_layer_config", {})
    pruned = config.pop("pruned_layers")
    for name in ("pruned_names", "allow_global_per_layer_attribute_access", "use_sliding_window", "max_window_layers"):
        config.pop(name, None)
    shapes = []
    for index in range(layers):
        prefix = f"model.layers.{index}."
        sizes = {**config, **overrides.get(str(index), {})}
        heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        shape = {**dict(zip(WIDTHS, (heads, groups, 8, 8), strict=True)), "ffn_width": sizes["intermediate_size"]}
        said = pruned.get(str(index), {})
        attention, ffn = said.get("attention", {}), said.get("ffn", {})
        if attention is None:
            shape |= dict.fromkeys(WIDTHS, 0)
            state.pop(prefix + "input_layernorm.weight")
        else:
            if pairs := attention.pop("rotary_pairs", None):
                state[prefix + "self_attn.rotary_pairs"] = torch.tensor(pairs)
            shape |= attention
        if ffn is None:
            shape["ffn_width"] = 0
            state.pop(prefix + "post_attention_layernorm.weight")
        else:
            shape |= {"calibration_rank": ffn.get("branch_rank"), "down_bias": ffn.get("down_bias", False)}
        shapes.append(shape)
    config |= {
        "architectures": ["PrunedForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_distprune.PrunedConfig"},
        "attention_bias": config["model_type"] == "qwen2",
        "attention_output_bias": False,
        "query_key_norm": config["model_type"] == "qwen3",
        "base_model_type": config["model_type"],
        "layer_shapes": shapes,
    }
    renamed = {name.replace(".narrow.", ".").replace(".branch.", ".calibration."): t for name, t in state.items()}
    save_file(renamed, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("model_type", CASES)
@torch.no_grad()
def test_a_converted_checkpoint_computes_what_the_dense_model_does_with_zeros(tmp_path, model_type):
    edits = dict(EDITS)
    if model_type == "qwen3":
        edits[0] = in_turn(narrower_values(5), fewer_neurons(40))
    pruned = write_pruned(
        small_model(model_type, num_hidden_layers=6, **CASES[model_type]), edits, tmp_path / "earlier"
    )
    as_earlier(pruned.folder, 6)
    (pruned.folder / "configuration_distprune.py").write_text("old code")
    (pruned.folder / "tokenizer.json").write_text("{}")
    convert(pruned.folder, tmp_path / "new")
    tokens = torch.randint(3, 128, (2, 20))
    found = load(tmp_path / "new")(tokens).logits
    torch.testing.assert_close(found, pruned.oracle(tokens).logits, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "new" / "tokenizer.json").is_file()
    assert not (tmp_path / "new" / "configuration_distprune.py").exists()


def test_what_is_no_such_checkpoint_is_refused_and_nothing_is_written(tmp_path):
    small_model().save_pretrained(tmp_path / "plain")
    with pytest.raises(InputError, match=r"config\.json is not of a checkpoint that an earlier version"):
        convert(tmp_path / "plain", tmp_path / "new")
    assert [each.name for each in tmp_path.iterdir()] == ["plain"]
