"""The names of tensors on disk and in the module tree, for what transformers itself saves and what hubs hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from distprune.checkpoint import Checkpoint
from distprune.errors import InputError
from distprune.families.disk_names import DiskNames, disk_names
from distprune.families.language_model import language_config
from distprune.families.tied import differ_though_tied

WEIGHTS = "model.safetensors"
DECODER = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
GATED = DECODER | {"intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8} | {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
BLOCKS = {"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
PLAIN = {
    "llama": GATED,
    "qwen2": GATED,
    "phi3": GATED,
    "glm4": GATED,
    "cohere2": GATED,
    "olmo2": GATED,
    "gemma3_text": GATED,
    "gpt_neox": DECODER | {"intermediate_size": 48},
    "opt": DECODER | {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "qwen3_5_text": GATED | {"num_hidden_layers": 4} | LINEAR,
}
WITH_VISION = {
    "gemma3": {"text_config": GATED, "vision_config": VISION, "mm_tokens_per_image": 1},
    "mistral3": {
        "text_config": GATED | {"model_type": "mistral"},
        "vision_config": VISION | {"model_type": "pixtral", "head_dim": 8},
        "tie_word_embeddings": False,
    },
    "llava": {
        "text_config": GATED | {"model_type": "llama"},
        "vision_config": VISION | {"model_type": "clip_vision_model"},
    },
    "qwen2_5_vl": {"text_config": GATED, "vision_config": BLOCKS},
    "blip-2": {
        "text_config": DECODER | {"model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
        "vision_config": VISION,
        "qformer_config": {name: VISION[name] for name in VISION if not name.endswith("_size")} | {"hidden_size": 16},
    },
    "qwen3_5": {
        "text_config": GATED | {"num_hidden_layers": 4} | LINEAR,
        "vision_config": BLOCKS | {"num_position_embeddings": 16},
    },
}


def build(config) -> PreTrainedModel:
    torch.manual_seed(0)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
    return model


def save(model_type: str, folder: Path, **settings) -> PreTrainedModel:
    """A tiny random model of the type, which transformers has saved in the folder."""
    model = build(AutoConfig.for_model(model_type, **settings))
    model.save_pretrained(folder)
    return model


def empty_language_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The language model by its own class, or the whole model where it has none."""
    config = language_config(checkpoint.config)[0]
    with torch.device("meta"):
        if type(config) in AutoModelForCausalLM._model_mapping:
            return AutoModelForCausalLM.from_config(config)
        return AutoModelForImageTextToText.from_config(checkpoint.config)


def names_of(folder: Path) -> tuple[DiskNames, Checkpoint, PreTrainedModel]:
    checkpoint = Checkpoint.open(folder)
    model = empty_language_model(checkpoint)
    return disk_names(model, checkpoint), checkpoint, model


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def rename(folder: Path, new: Callable[[str], str]) -> None:
    rewrite(folder, lambda tensors: {new(name): tensor for name, tensor in tensors.items()})


def assert_found(names: DiskNames, checkpoint: Checkpoint, expected: dict[str, torch.Tensor]) -> None:
    """Every name in the tree leads to the tensor that transformers has there, and back."""
    for name, tensor in expected.items():
        stored = names.on_disk(name)
        assert torch.equal(checkpoint.read([stored])[stored], tensor), name
        assert names.in_module(stored) in {tree for tree, disk in names.stored.items() if disk == stored}
    assert {*names.stored.values()} | {*names.carried} == set(checkpoint.tensors)
    assert {*names.stored.values()}.isdisjoint(names.carried)
    assert [name for name in names.carried if names.in_module(name)] == []


# ---------------------------------------------------------------- what transformers saves


@pytest.mark.parametrize("model_type", PLAIN)
def test_a_language_models_tensors_are_found_and_go_back(model_type, tmp_path):
    saved = save(model_type, tmp_path, **PLAIN[model_type])
    names, checkpoint, model = names_of(tmp_path)
    assert names.carried == ()
    assert {*names.stored} == {*model.state_dict()}
    assert_found(names, checkpoint, saved.state_dict())


@pytest.mark.parametrize("model_type", WITH_VISION)
def test_a_language_model_is_found_within_one_with_vision(model_type, tmp_path):
    saved = save(model_type, tmp_path, **WITH_VISION[model_type])
    names, checkpoint, _ = names_of(tmp_path)
    decoder, head = saved.get_decoder().state_dict(), saved.get_output_embeddings().weight
    prefix = {"qwen2_5_vl": "model.language_model.", "blip-2": ""}.get(model_type, "model.")
    expected = {f"{prefix}{name}": tensor for name, tensor in decoder.items()} | {"lm_head.weight": head}
    assert {*names.stored} == {*expected}
    assert_found(names, checkpoint, expected)
    assert len(names.carried) == len(saved.state_dict()) - len(expected)


@pytest.mark.parametrize("model_type", ["mistral3", "gemma3", "qwen3_5"])
def test_the_head_is_tied_where_the_whole_model_says_so(model_type, tmp_path):
    settings = WITH_VISION[model_type]
    settings = settings | {"tie_word_embeddings": True}
    settings["text_config"] = settings["text_config"] | {"tie_word_embeddings": False}
    save(model_type, tmp_path, **settings)
    names, checkpoint, model = names_of(tmp_path)
    assert names.on_disk("lm_head.weight") == names.on_disk("model.embed_tokens.weight")
    assert model.config.tie_word_embeddings
    assert model.config.dtype == checkpoint.config.dtype
    assert model.config.name_or_path == str(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_a_whole_model_that_says_nothing_of_ties_leaves_them_to_its_language_model(tied):
    config = AutoConfig.for_model("mllama", text_config={"tie_word_embeddings": tied})
    assert not hasattr(config, "tie_word_embeddings")
    found, is_part = language_config(config)
    assert is_part
    assert found.tie_word_embeddings is tied


def test_a_plain_configuration_is_the_language_models_own():
    config = AutoConfig.for_model("llama", **GATED)
    found, is_part = language_config(config)
    assert found is config
    assert not is_part


# ---------------------------------------------------------------- what others have saved


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "opt"])
def test_a_base_models_checkpoint_lacks_the_prefix(model_type, tmp_path):
    saved = save(model_type, tmp_path, **PLAIN[model_type], tie_word_embeddings=True)
    prefix = f"{saved.base_model_prefix}."
    rename(tmp_path, lambda name: name.removeprefix(prefix))
    names, checkpoint, _ = names_of(tmp_path)
    assert not any(name.startswith(prefix) for name in checkpoint.tensors)
    assert_found(names, checkpoint, saved.state_dict())


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_a_model_with_vision_has_its_language_model_where_either_version_put_it(prefix, tmp_path):
    saved = save("gemma3", tmp_path, **WITH_VISION["gemma3"])
    rename(tmp_path, lambda name: name.replace("language_model.model.", prefix))
    names, checkpoint, _ = names_of(tmp_path)
    decoder = saved.get_decoder().state_dict()
    assert_found(names, checkpoint, {f"model.{name}": tensor for name, tensor in decoder.items()})
    assert names.on_disk("model.layers.1.self_attn.q_proj.weight") == f"{prefix}layers.1.self_attn.q_proj.weight"


def test_a_language_model_alone_may_keep_the_names_that_it_had_within_one_with_vision(tmp_path):
    saved = save("qwen3_5_text", tmp_path, **PLAIN["qwen3_5_text"])
    rename(tmp_path, lambda name: name.replace("model.", "model.language_model."))
    names, checkpoint, _ = names_of(tmp_path)
    assert_found(names, checkpoint, saved.state_dict())


def test_what_has_no_place_in_the_module_tree_is_carried(tmp_path):
    saved = save("llama", tmp_path, **PLAIN["llama"])
    extra = ["model.layers.2.self_attn.q_proj.weight", "mtp.layers.0.mlp.up_proj.weight", "score.weight"]
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.randn(3, 4) for name in extra})
    names, checkpoint, _ = names_of(tmp_path)
    assert {*names.carried} == {*extra}
    assert names.carried_in("model.layers.1.") == names.carried_in("model.layers.2.") == ()
    assert_found(names, checkpoint, saved.state_dict())


@pytest.mark.parametrize(
    ("model_type", "buffers"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]),
        ("gpt_neox", [f"gpt_neox.layers.1.attention.{n}" for n in ("bias", "masked_bias", "rotary_emb.inv_freq")]),
    ],
)
def test_buffers_that_are_computed_when_a_model_is_built_are_left_out(model_type, buffers, tmp_path):
    save(model_type, tmp_path, **PLAIN[model_type])
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.ones(2) for name in buffers})
    names, checkpoint, _ = names_of(tmp_path)
    assert {*buffers} == set(checkpoint.tensors) - {*names.stored.values()}
    assert names.carried == ()


@pytest.mark.parametrize("stored", ["model.embed_tokens.weight", "lm_head.weight"])
def test_either_of_two_that_are_tied_may_be_stored(stored, tmp_path):
    saved = save("llama", tmp_path, **PLAIN["llama"], tie_word_embeddings=True)
    rename(tmp_path, lambda name: stored if "embed" in name else name)
    names, checkpoint, _ = names_of(tmp_path)
    assert {names.on_disk(name) for name in ("model.embed_tokens.weight", "lm_head.weight")} == {stored}
    assert names.in_module(stored) == stored
    assert_found(names, checkpoint, saved.state_dict())


def test_both_of_two_that_are_tied_may_be_stored(tmp_path):
    save("llama", tmp_path, **PLAIN["llama"], tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    names, checkpoint, model = names_of(tmp_path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert names.on_disk(name) == names.in_module(name) == name
    assert not differ_though_tied(model, checkpoint, names)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["lm_head.weight"] + 1})
    assert differ_though_tied(model, Checkpoint.open(tmp_path), names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight)


def test_one_that_is_stored_for_both_of_two_does_not_differ_from_itself(tmp_path):
    save("llama", tmp_path, **PLAIN["llama"], tie_word_embeddings=True)
    names, checkpoint, model = names_of(tmp_path)
    assert not differ_though_tied(model, checkpoint, names)


# ---------------------------------------------------------------- what pruning adds


@pytest.mark.parametrize(
    ("model_type", "new", "stored"),
    [
        ("llama", "model.layers.1.self_attn.right.q_proj.weight", "model.layers.1.self_attn.right.q_proj.weight"),
        ("gemma3", "model.layers.1.mlp.branch.left", "language_model.model.layers.1.mlp.branch.left"),
        ("gemma3", "model.layers.1.self_attn.o_proj.bias", "language_model.model.layers.1.self_attn.o_proj.bias"),
        ("qwen3_5", "model.layers.3.mlp.down_proj.bias", "model.language_model.layers.3.mlp.down_proj.bias"),
        ("opt", "model.decoder.layers.0.fc3.weight", "model.decoder.layers.0.fc3.weight"),
    ],
)
def test_a_new_tensor_is_named_as_its_neighbours_are(model_type, new, stored, tmp_path):
    save(model_type, tmp_path, **{**PLAIN, **WITH_VISION}[model_type])
    assert names_of(tmp_path)[0].on_disk(new) == stored


def test_a_new_tensor_of_a_base_models_checkpoint_lacks_the_prefix_too(tmp_path):
    save("llama", tmp_path, **PLAIN["llama"], tie_word_embeddings=True)
    rename(tmp_path, lambda name: name.removeprefix("model."))
    assert names_of(tmp_path)[0].on_disk("model.layers.0.mlp.branch.right") == "layers.0.mlp.branch.right"


def test_neighbours_with_names_of_their_own_on_disk_lead_as_far_as_they_agree():
    layer = "model.layers.0"
    names = DiskNames({f"{layer}.attn.q.weight": "h.0.wq.weight", f"{layer}.norm.weight": "h.0.norm.weight"})
    assert names.on_disk(f"{layer}.attn.q.bias") == "h.0.wq.bias"
    assert names.on_disk(f"{layer}.attn.right") == "h.0.attn.right"
    assert names.on_disk("lm_head.weight") == "lm_head.weight"


def test_names_travel_as_json(tmp_path):
    save("gemma3", tmp_path, **WITH_VISION["gemma3"])
    names = names_of(tmp_path)[0]
    assert DiskNames.from_json(json.loads(json.dumps(names.to_json()))) == names


# ---------------------------------------------------------------- what is refused


def test_a_missing_tensor_is_named_as_it_would_be_on_disk(tmp_path):
    save("gemma3", tmp_path, **WITH_VISION["gemma3"])
    gone = "language_model.model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != gone})
    with pytest.raises(InputError, match=rf"lacks 1 tensor\(s\) that its config\.json calls for: {gone}\. Check"):
        names_of(tmp_path)


def test_a_missing_embedding_is_named(tmp_path):
    save("llama", tmp_path, **PLAIN["llama"], tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: {name: tensor for name, tensor in tensors.items() if "embed" not in name})
    with pytest.raises(InputError, match=r"lacks 1 tensor\(s\).*: model\.embed_tokens\.weight\. Check"):
        names_of(tmp_path)


def test_another_shape_is_named(tmp_path):
    save("llama", tmp_path, **PLAIN["llama"])
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(tmp_path, lambda tensors: tensors | {name: torch.ones(47, 32)})
    with pytest.raises(InputError, match=rf"{name} in .*{WEIGHTS} has shape \(47, 32\), expected \(48, 32\)"):
        names_of(tmp_path)


@pytest.mark.parametrize(("rows", "tied"), [(100, False), (100, True), (90, False)])
def test_another_number_of_tokens_than_the_vocabulary_has_is_refused_as_transformers_does(rows, tied, tmp_path):
    save("llama", tmp_path, **PLAIN["llama"], tie_word_embeddings=tied)
    resized = torch.ones(rows, 32)
    rewrite(tmp_path, lambda ts: {name: resized.clone() if len(t) == 96 else t for name, t in ts.items()})
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"embed_tokens\.weight has {rows} rows.*vocab_size of 96.*Set vocab_size to"):
        names_of(tmp_path)


def test_a_part_in_integers_is_refused_and_what_is_carried_may_be_in_any_dtype(tmp_path):
    save("llama", tmp_path, **PLAIN["llama"])
    rewrite(tmp_path, lambda tensors: tensors | {"visual.order": torch.arange(3, dtype=torch.int8)})
    assert names_of(tmp_path)[0].carried == ("visual.order",)
    save("qwen2", tmp_path, **PLAIN["qwen2"])
    name = "model.layers.0.self_attn.q_proj.bias"
    rewrite(tmp_path, lambda tensors: tensors | {name: tensors[name].to(torch.int8)})
    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor {name} is stored as int8, which can't be pruned. Write"):
        names_of(tmp_path)


def test_a_model_that_transformers_cannot_build_is_named(tmp_path):
    save("gemma3", tmp_path, **WITH_VISION["gemma3"])
    checkpoint = Checkpoint.open(tmp_path)
    model = empty_language_model(checkpoint)
    checkpoint.config.vision_config.hidden_size = 17  # which its two heads don't divide
    with pytest.raises(InputError, match=r"config\.json: transformers can't build the gemma3 model.*Install what"):
        disk_names(model, checkpoint)


def test_a_model_with_an_encoder_is_refused():
    config = AutoConfig.for_model("t5", name_or_path="folder")
    with pytest.raises(InputError, match=r"config\.json: model_type 't5' has an encoder.*Give a model with a decoder"):
        language_config(config)
