"""From layers that lack whole parts, and from layers that all lack as much, to checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from distprune import InputError
from distprune.budgets import Target
from distprune.decoder_layer import LayerShape
from distprune.engine import load_record
from distprune.families import FAMILIES
from distprune.methods import METHODS, Method, Plan, Profile
from distprune.methods.magnitude import Magnitude
from distprune.methods.units import keep_rotary_pairs, with_heads, without_attention, without_ffn
from distprune.modeling import PrunedForCausalLM
from distprune.reporting.tables import layer_table

NO_ATTENTION = {"query_heads": 0, "kv_heads": 0, "query_key_dim": 0, "value_dim": 0}
PAIRS = torch.tensor([[0, 3, 7], [1, 2, 5]])


class Reducing(Method):
    """Leaves the first of three layers without attention, the second without anything, the third with an attention
    of fewer rotary pairs alone."""

    name: ClassVar[str] = "reducing"

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        changes = NO_ATTENTION, NO_ATTENTION | {"ffn_width": 0}, {"query_key_dim": 6, "ffn_width": 0}
        return Plan(replace(shape, **change) for shape, change in zip(target.dense_shapes, changes, strict=True))

    def pruning_moments(self, dense: LayerShape, planned: LayerShape):
        return ()

    def prune(self, layer, planned, statistics, profile, observe):
        layer = keep_rotary_pairs(layer, PAIRS) if planned.has_attention else without_attention(layer)
        return layer if planned.has_ffn else without_ffn(layer)


class Even(Magnitude):
    """Leaves every layer as many KV groups and neurons."""

    name: ClassVar[str] = "even"
    groups: int

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        return Plan(replace(with_heads(shape, self.groups, 1), ffn_width=40) for shape in target.dense_shapes)


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    for method in (Reducing, Even):
        monkeypatch.setitem(METHODS, method.name, method)


@pytest.mark.parametrize("distill", [None, {"learning_rate": 1e-3, "batch": 2}, {"train": "lora", "batch": 2}])
@pytest.mark.parametrize("max_shard_size", [1, 160_000, 10**9])
@torch.no_grad()
def test_layers_may_lack_parts_and_everything(prune_here, save_model, tmp_path, distill, max_shard_size):
    dense_path = save_model(num_hidden_layers=3)
    folder = tmp_path / "pruned"
    with torch.enable_grad():
        record = prune_here(folder, dense_path, method="reducing", distill=distill, max_shard_size=max_shard_size)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is PrunedForCausalLM
    assert record.layout == "per-layer"
    assert model.model.layers[2].self_attn.rotary_pairs.tolist() == PAIRS.tolist()
    assert record.total_parameters_after == sum(parameter.numel() for parameter in model.parameters())
    assert [layer.parameters_after for layer in record.layers] == [
        sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers
    ]
    index = folder / "model.safetensors.index.json"
    files = {file.name for file in folder.glob("*.safetensors")}
    if index.is_file():
        written = json.loads(index.read_text())
        assert files == set(written["weight_map"].values())
        assert written["metadata"]["total_parameters"] == record.total_parameters_after

    if distill is None:
        dense = AutoModelForCausalLM.from_pretrained(dense_path)
        for position in (0, 1):
            dense.model.layers[position].self_attn.o_proj.weight.zero_()
        for position in (1, 2):
            dense.model.layers[position].mlp.down_proj.weight.zero_()
        for head, rows in enumerate(dense.model.layers[2].self_attn.q_proj.weight.chunk(4)):
            rows[[row for row in range(16) if row % 8 not in PAIRS[head // 2].tolist()]] = 0
        ids = torch.arange(48).reshape(2, 24)
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, atol=1e-5, rtol=1e-5)
    else:
        lessons = [layer.distillation for layer in load_record(folder).layers]
        assert lessons[1].training == []
        assert not lessons[1].kept
        assert lessons[1].held_out_after == lessons[1].held_out_before > 0

    console = Console(width=120, record=True)
    console.print(layer_table(load_record(folder)))
    assert "0/2" in console.export_text()


def test_a_model_that_was_reduced_is_no_model_to_prune_but_is_refused_by_name(prune_here, tmp_path):
    prune_here(tmp_path / "pruned", method="reducing", distill=None)
    with pytest.raises(InputError, match="is of a model that distprune has pruned already"):
        prune_here(tmp_path / "again", tmp_path / "pruned", method="reducing", distill=None)


@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("model_type", FAMILIES)
@torch.no_grad()
def test_as_many_groups_in_every_layer_are_the_original_architecture(
    prune_here, save_model, tmp_path, model_type, groups
):
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    dense_path = save_model(model_type, **sizes, **({"head_dim": 8} if model_type == "qwen3" else {}))
    folder = tmp_path / "pruned"
    record = prune_here(
        folder, dense_path, method="even", options={"groups": groups}, distill=None, max_shard_size=10**9
    )
    dense, pruned = (AutoModelForCausalLM.from_pretrained(path) for path in (dense_path, folder))
    # As transformers' Llama insists, heads are to divide the hidden size.
    stock = groups == 3
    assert record.layout == ("stock" if stock else "per-layer")
    assert type(pruned) is (type(dense) if stock else PrunedForCausalLM)
    assert bool(list(folder.glob("*.py"))) != stock

    family = FAMILIES[model_type]
    shapes = [layer.pruned for layer in record.layers]
    ours = family.dense_config(dense.config)
    ours = PrunedForCausalLM(type(ours)(**ours.to_dict() | {"layer_shapes": [vars(shape) for shape in shapes]})).eval()
    ours.load_state_dict(load_file(folder / "model.safetensors"))
    ids = torch.arange(48).reshape(2, 24)
    torch.testing.assert_close(pruned(ids).logits, ours(ids).logits, atol=1e-5, rtol=1e-5)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert pruned.generate(ids, **greedy).tolist() == ours.generate(ids, **greedy).tolist()
