"""Models whose checkpoints have names of their own, such as those of which the language model is a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from layer_edits import Edit, factored, fewer_groups, fewer_neurons, in_turn, narrower_values
from pruned_checkpoints import write_pruned
from safetensors.torch import load_file, save_file
from small_models import SMALL
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from distprune.modeling import load

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
#: What their checkpoints call what transformers' modules call otherwise.
ON_DISK = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}
EDITS: dict[str, dict[int, Edit]] = {
    "stock": dict.fromkeys(range(4), in_turn(fewer_neurons(40), fewer_groups(2))),
    "heterogeneous": {1: in_turn(fewer_neurons(40), fewer_groups(2)), 2: fewer_neurons(33)},
    "free": {1: factored(query=9, output=11), 2: in_turn(narrower_values(5), fewer_neurons(33))},
}


def gemma3() -> PreTrainedModel:
    text = SMALL | {"head_dim": 8, "sliding_window": 6}
    config = Gemma3Config(text_config=text, vision_config=VISION, mm_tokens_per_image=4, image_token_index=100)
    return Gemma3ForConditionalGeneration(config)


def llava() -> PreTrainedModel:
    vision = VISION | {"model_type": "clip_vision_model", "projection_dim": 16}
    text = SMALL | {"model_type": "llama"}
    return LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=100))


def gpt_neox() -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt_neox", **SMALL))


@pytest.mark.parametrize("layout", EDITS)
@pytest.mark.parametrize("make", [gemma3, llava])
def test_the_whole_opens_in_every_layout(tmp_path, make, layout):
    assert_opens(make, ON_DISK, EDITS[layout], layout, AutoModelForImageTextToText, tmp_path)


def test_a_head_of_another_name_is_found(tmp_path):
    edits = {1: factored(query=9, output=11)}
    assert_opens(gpt_neox, {"lm_head.": "embed_out."}, edits, "free", AutoModelForCausalLM, tmp_path)


@torch.no_grad()
def assert_opens(
    make, on_disk: dict[str, str], edits: dict[int, Edit], layout: str, auto: type, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    pruned = write_pruned(model, edits, tmp_path)
    assert pruned.layout == layout
    state = load_file(tmp_path / "model.safetensors")
    for ours, theirs in on_disk.items():
        state = {theirs + name.removeprefix(ours) if name.startswith(ours) else name: t for name, t in state.items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    tokens = torch.randint(3, 90, (2, 20))
    expected = pruned.oracle(input_ids=tokens).logits
    load(tmp_path).save_pretrained(tmp_path / "again")
    for loaded in (
        load(tmp_path),
        auto.from_pretrained(tmp_path, trust_remote_code=True),
        load(tmp_path / "again"),
    ):
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, atol=1e-4, rtol=1e-4)
