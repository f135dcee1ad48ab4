"""From layers that lack whole parts, and from layers that all lack as much, to checkpoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from distprune import load
from distprune.budgets import Target
from distprune.engine import load_record
from distprune.layers.shapes import LayerShape
from distprune.methods import METHODS, LayerToPrune, Method, Plan, Profile
from distprune.methods.magnitude import Magnitude
from distprune.methods.units import keep_rotary_pairs
from distprune.reporting.run_tables import layer_table

PAIRS = torch.tensor([[0, 3, 7], [1, 2, 5]])


class Reducing(Method):
    """Leaves the first of three layers without attention, the second without anything, the third with an attention
    of fewer rotary pairs alone."""

    name: ClassVar[str] = "reducing"

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        first, _, third = target.dense_shapes
        narrow = replace(third.with_attention(query_key_dim=6), ffn=None)
        return Plan([replace(first, attention=None), LayerShape(None, None), narrow])

    def pruning_moments(self, dense: LayerShape, planned: LayerShape):
        return ()

    def prune(self, given: LayerToPrune):
        layer, planned = given.layer, given.planned
        attention = planned.attention and keep_rotary_pairs(layer.attention, PAIRS)
        return replace(layer, attention=attention, ffn=planned.ffn and layer.ffn)


class Even(Magnitude):
    """Leaves every layer as many KV groups and neurons."""

    name: ClassVar[str] = "even"
    groups: int

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        heads = {"query_heads": self.groups, "kv_heads": self.groups}
        return Plan(shape.with_attention(**heads).with_ffn(width=40) for shape in target.dense_shapes)


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
    model = load(folder)
    assert type(model).__name__ == "PrunedLlamaForCausalLM"
    assert record.layout == "free"
    said = json.loads((folder / "config.json").read_text())["pruned_layers"]
    assert said["2"]["attention"]["rotary_pairs"] == PAIRS.tolist()
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
        reports = [layer.distillation for layer in load_record(folder).layers]
        assert reports[1].held_out_before > 0

    console = Console(width=120, record=True)
    console.print(layer_table(load_record(folder)))
    assert "3/8" in console.export_text()


@pytest.mark.parametrize("groups", [3, 5])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
@torch.no_grad()
def test_as_many_groups_in_every_layer_are_the_original_architecture(
    prune_here, save_model, tmp_path, model_type, groups
):
    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6, "head_dim": 8}
    dense_path = save_model(model_type, **sizes)
    folder = tmp_path / "pruned"
    record = prune_here(
        folder, dense_path, method="even", options={"groups": groups}, distill=None, max_shard_size=10**9
    )
    pruned, dense = load(folder), AutoModelForCausalLM.from_pretrained(dense_path)
    # As transformers' Llama insists, heads are to divide the hidden size.
    is_stock = groups == 3
    assert record.layout == ("stock" if is_stock else "heterogeneous")
    assert type(pruned).__name__ == ("" if is_stock else "Pruned") + type(dense).__name__
    assert bool(list(folder.glob("*.py"))) != is_stock
    ids = torch.arange(48).reshape(2, 24)
    assert pruned(ids).logits.isfinite().all()
