"""Runs whose method sets weights to zero, in matrices that keep their size."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tiny_families import EXPERTS
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from distprune import InputError
from distprune.cli import app
from distprune.engine import load_record

OPTIONS = {"method": "z-pruner", "sparsity": 0.5, "distill": None}
UNSTRUCTURED = OPTIONS | {"options": {"mode": "unstructured"}}


def stored(folder) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def linears(folder) -> dict[str, Tensor]:
    """The weights of the decoder layers' linear maps, by transformers' own class."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    modules = model.model.layers.named_modules()
    return {name: module.weight.detach() for name, module in modules if isinstance(module, nn.Linear)}


@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_asked_fraction_is_zero_and_nothing_else_has_changed(prune_here, llama, tmp_path, pattern):
    options = UNSTRUCTURED | {"options": {"mode": "unstructured", "pattern": pattern}}
    record = prune_here(tmp_path / "pruned", **options)
    before, after = linears(llama), linears(tmp_path / "pruned")
    assert before.keys() == after.keys()
    for name, weight in after.items():
        assert (weight == 0).float().mean() == pytest.approx(0.5, abs=1 / weight.numel())
        assert torch.equal(weight, before[name] * (weight != 0))
        if pattern:
            assert (weight.unflatten(1, (-1, 4)) != 0).sum(dim=2).max() == 2
    dense, pruned = stored(llama), stored(tmp_path / "pruned")
    assert {name: tensor.shape for name, tensor in dense.items()} == {name: t.shape for name, t in pruned.items()}
    assert record.layout == "stock" and record.zeroed == 0.5
    assert record.decoder_parameters_after == record.decoder_parameters_before
    assert record.sparsity_reached(False) == 0.5


def test_the_result_says_that_nothing_was_removed(prune_here, tmp_path):
    record = prune_here(tmp_path / "pruned", **UNSTRUCTURED)
    [note] = [note for note in record.notes if "zero" in note]
    assert "sets 50.0% of the weights" in note and "removes none" in note
    assert load_record(tmp_path / "pruned") == record
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "pruned")]).output
    assert "removes none" in " ".join(shown.split())
    card = (tmp_path / "pruned" / "README.md").read_text()
    assert "50.0% of the weights of its attention and feed-forward networks set to zero" in card
    assert "removes no parameter" in card and "removed by structured pruning" not in card
    assert "zeros in place of 50% of the weights of the decoder layers" in card


def test_units_are_removed_and_nothing_is_said_of_zeros(prune_here, tmp_path):
    record = prune_here(tmp_path / "pruned", **OPTIONS)
    assert record.zeroed is None and record.decoder_sparsity == pytest.approx(0.5, abs=0.03)
    assert not any("zero" in note for note in record.notes)
    assert "removed by structured pruning" in (tmp_path / "pruned" / "README.md").read_text()


#: A run in chunks sees the experts' inputs behind attention with its zeros, another one behind the dense attention. Of
#: DeepSeek-V3's attention nothing is zeroed.
@pytest.mark.parametrize(("model_type", "apart"), [("deepseek_v3", 0.01), ("gpt_oss", 0.15)])
def test_in_chunks_of_experts_as_many_weights_become_zero(model_type, apart, save_mixture, prune_here, tmp_path):
    model, options = save_mixture(model_type), UNSTRUCTURED | {"propagation": "full"}
    prune_here(tmp_path / "whole", model, **options)
    prune_here(tmp_path / "chunked", model, **options, experts_at_once=EXPERTS // 2)
    dense, whole, chunked = map(stored, (model, tmp_path / "whole", tmp_path / "chunked"))
    assert dense.keys() == whole.keys() == chunked.keys()
    for name, tensor in whole.items():
        assert torch.equal(chunked[name], dense[name] * (chunked[name] != 0)), name
        assert (chunked[name] == 0).sum() == (tensor == 0).sum(), name
        assert ((tensor == 0) != (chunked[name] == 0)).float().mean() < apart, name
        if ".experts." in name and name.endswith(("proj.weight", "down_proj", "gate_up_proj")):
            assert (tensor == 0).float().mean() == pytest.approx(0.5, abs=0.01), name


def test_distillation_is_refused_before_anything_is_written(prune_here, tmp_path):
    with pytest.raises(InputError, match=r"--distill: method z-pruner .* zero.*Leave out --distill"):
        prune_here(tmp_path / "pruned", **UNSTRUCTURED | {"distill": {"batch": 2}})
    assert not (tmp_path / "pruned").exists()
