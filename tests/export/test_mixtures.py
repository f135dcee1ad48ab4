"""Mixtures of experts in every layout: opened, run, saved and pruned again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from layer_edits import Edit, factored, fewer_groups, fewer_neurons, in_turn, narrower_values, without_ffn
from mixture_edits import fewer_experts, narrower_experts
from pruned_checkpoints import PrunedCheckpoint, save_as_made, write_pruned
from safetensors.torch import load_file
from tiny_families import MIXTURES, VOCABULARY, tiny_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from distprune.layers.architecture import Architecture
from distprune.layers.parts import DecoderLayer, Experts
from distprune.modeling import load

#: Families whose experts lie together on disk too.
STORED_TOGETHER = ("gpt_oss", "granitemoe", "qwen3_5_moe_text")
LAYOUTS = ("stock", "heterogeneous", "free")
TOKENS = torch.randint(3, VOCABULARY, (2, 20), generator=torch.Generator().manual_seed(1))


def smaller(experts: int, width: int, neurons: int, groups: int) -> Edit:
    """Fewer and narrower experts in a layer that is a mixture, fewer neurons in any other.

    Widths of experts are multiples of 4 here, since grouped products ask for rows that are multiples of 16 bytes.
    """
    of_mixtures = in_turn(narrower_experts(width, shared_width=width - 2), fewer_experts(experts, groups))

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        return (of_mixtures if isinstance(layer.ffn, Experts) else fewer_neurons(neurons))(layer)

    return edit


def edits_for(model: PreTrainedModel, layout: str) -> dict[int, Edit]:
    architecture = Architecture(model.config)
    groups, layers = architecture.dense_shape(3).ffn.groups, range(architecture.num_layers)
    may_go = [architecture.removable(index) for index in layers]
    if layout == "stock":
        heads = {index: [fewer_groups(2)] if may_go[index].heads else [] for index in layers}
        return {index: in_turn(*heads[index], smaller(4, 24, 40, groups)) for index in layers}
    own = {0: smaller(6, 24, 40, groups), 2: smaller(4, 32, 40, groups), 3: smaller(6, 16, 40, groups)}
    if layout == "heterogeneous":
        return own | {3: in_turn(own[3], *([fewer_groups(2)] if may_go[3].heads else []))}
    values = [narrower_values(5)] if may_go[3].values else []
    factors = [factored(query=9, output=11)] if may_go[3].factors and not values else []
    return own | {2: without_ffn, 3: in_turn(own[3], *values, *factors)}


@pytest.fixture(scope="module", params=[(name, layout) for name in MIXTURES for layout in LAYOUTS], ids="-".join)
def pruned(request, tmp_path_factory) -> PrunedCheckpoint:
    model_type, layout = request.param
    model = tiny_model(model_type)
    checkpoint = write_pruned(model, edits_for(model, layout), tmp_path_factory.mktemp(layout) / "pruned")
    assert checkpoint.layout == layout
    return checkpoint


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    return model(TOKENS).logits


def greedy(model: PreTrainedModel, tokens: Tensor, **options) -> list[list[int]]:
    found = model.generate(tokens, max_new_tokens=8, do_sample=False, eos_token_id=None, **options)
    return found[:, tokens.shape[1] :].tolist()


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def opened(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_it_opens_with_this_package_and_from_the_folder_alone(pruned):
    expected = logits(pruned.oracle)
    model = load(pruned.folder)
    assert type(model).__name__.startswith("Pruned") == (pruned.layout != "stock")
    assert_same(logits(model), expected)
    assert_same(logits(opened(pruned.folder)), expected)
    assert list(pruned.folder.glob("*.py")) == [] or pruned.layout != "stock"


def test_it_generates_with_a_cache_and_without_and_with_left_padding(pruned):
    model = load(pruned.folder)
    expected = greedy(pruned.oracle, TOKENS)
    assert len({token for row in expected for token in row}) > 2
    assert greedy(model, TOKENS) == expected
    assert greedy(model, TOKENS, use_cache=False) == expected
    padded = torch.cat([torch.zeros(1, 7, dtype=torch.long), TOKENS[:1, 7:]], dim=1)
    batch = torch.cat([padded, TOKENS[1:]])
    together = greedy(model, batch, attention_mask=(batch != 0).long())
    assert together == greedy(pruned.oracle, TOKENS[:1, 7:]) + greedy(pruned.oracle, TOKENS[1:])


def test_it_is_saved_and_opened_again(pruned, tmp_path):
    model = load(pruned.folder)
    model.save_pretrained(tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (pruned.folder, tmp_path))
    assert after == before
    again = load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_it_opens_when_its_experts_are_stored_apart(pruned, tmp_path):
    model = load(pruned.folder)
    save_as_made(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    together = {name for name in model.state_dict() if ".experts." in name and name in stored}
    assert not together or model.config.model_type in STORED_TOGETHER
    again = load(tmp_path).state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in model.state_dict().items())


def test_it_is_read_back_and_pruned_again(pruned, tmp_path):
    model = load(pruned.folder)
    architecture = Architecture(AutoConfig.from_pretrained(pruned.folder))
    state = model.state_dict()
    for index in range(architecture.num_layers):
        prefix, shape = architecture.layer_prefix(index), architecture.dense_shape(index)
        own = {name.removeprefix(prefix): tuple(t.shape) for name, t in state.items() if name.startswith(prefix)}
        assert architecture.layer_tensors(index, shape) == own
    groups = architecture.dense_shape(3).ffn.groups
    edits = {3: smaller(4, 12, 30, groups)} | ({} if pruned.layout == "free" else {2: smaller(4, 24, 30, groups)})
    twice = write_pruned(model, edits, tmp_path)
    assert_same(logits(load(tmp_path)), logits(twice.oracle))
    shape = Architecture(AutoConfig.from_pretrained(tmp_path)).dense_shape(3)
    assert (shape.ffn.count, shape.ffn.width) == (4, 12)
