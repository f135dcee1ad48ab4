"""Whole runs over mixtures of experts: what pruning doesn't touch is on disk as it was, and the result opens."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import EXPERTS
from transformers import AutoModelForCausalLM, Mxfp4Config

from distprune import InputError, load
from distprune.checkpoint import Checkpoint
from distprune.config import PruneConfig
from distprune.engine.run.preflight import dense_model
from distprune.planning import Cluster
from distprune.planning.counting import Counting
from distprune.planning.scenario import make_scenario
from distprune.planning.valueless_checkpoint import ValuelessCheckpoint

WEIGHTS = "model.safetensors"
STORED_APART, STORED_TOGETHER = ["mixtral", "deepseek_v3", "qwen3_next"], ["gpt_oss", "granitemoe"]


def stored(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("model_type", [*STORED_APART, *STORED_TOGETHER])
def test_at_sparsity_0_every_tensor_is_as_it_was(model_type, save_mixture, prune_here, tmp_path):
    model = save_mixture(model_type)
    record = prune_here(tmp_path / "pruned", model, method="magnitude", sparsity=0, distill=None)
    before, after = stored(model), stored(tmp_path / "pruned")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert record.layout == "stock"
    AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")


@pytest.mark.parametrize(
    ("method", "layout", "distill"),
    [("olica", "free", None), ("olica", "free", {"batch": 2}), ("curvature", "heterogeneous", None)],
)
def test_a_pruned_mixture_opens_and_is_saved_with_the_tensors_that_were_written(
    save_mixture, prune_here, tmp_path, method, layout, distill
):
    model, output = save_mixture("mixtral"), tmp_path / "pruned"
    record = prune_here(output, model, method=method, sparsity=0.2, distill=distill)
    assert record.layout == layout
    before, after = stored(model), stored(output)
    assert {name for name in before if ".experts." in name} >= {name for name in after if ".experts." in name}
    assert any(".block_sparse_moe.experts.0.w1." in name for name in after)
    for number, pruned in enumerate(
        (load(output), AutoModelForCausalLM.from_pretrained(output, trust_remote_code=True))
    ):
        assert pruned(torch.arange(3, 15)[None]).logits.isfinite().all()
        pruned.save_pretrained(tmp_path / f"again-{number}")
        again = stored(tmp_path / f"again-{number}")
        assert again.keys() == after.keys()
        assert all(torch.equal(again[name], after[name]) for name in after)


# ---------------------------------------------------------------- a part of a layer


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_layers_experts_are_read_and_written_some_at_a_time(model_type, save_mixture):
    folder = save_mixture(model_type)
    model, on_disk = dense_model(Checkpoint.open(folder)), load_file(folder / WEIGHTS)
    shape, state = model.architecture.dense_shape(1), model.read_state(1)
    fused = [name for name, tensor in state.items() if ".experts." in name]
    written = defaultdict(list)
    for some in (range(0, 5), range(5, EXPERTS)):
        part = model.read_experts(1, fused, some)
        assert all(torch.equal(part[name], state[name][some.start : some.stop]) for name in fused)
        for name, tensor in model.state_to_disk(1, part, shape, first_expert=some.start).items():
            written[name].append(tensor)
    expected = {name: tensor for name, tensor in on_disk.items() if ".layers.1." in name and ".experts." in name}
    assert written.keys() == expected.keys()
    assert all(torch.equal(torch.cat(parts), expected[name]) for name, parts in written.items())


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_a_plan_counts_what_is_read_of_a_mixture(model_type, save_mixture):
    folder = save_mixture(model_type)
    model, counting = dense_model(Checkpoint.open(folder)), Counting()
    expected = model.read_state(0)
    planned = replace(model, checkpoint=ValuelessCheckpoint(model.checkpoint, counting)).read_state(0)
    assert {name: tensor.shape for name, tensor in planned.items()} == {name: t.shape for name, t in expected.items()}
    assert counting.read == sum(tensor.nbytes for tensor in expected.values())


# ---------------------------------------------------------------- what is refused


def test_a_missing_expert_ends_a_run_before_anything_is_written(save_mixture, prune_here, calibrate, tmp_path):
    model, name = save_mixture("mixtral"), "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    calibration, tensors = calibrate(model), load_file(model / WEIGHTS)
    del tensors[name]
    save_file(tensors, model / WEIGHTS)
    with pytest.raises(InputError, match=rf"lacks 1 tensor\(s\) that its config.json calls for: {re.escape(name)}\."):
        prune_here(tmp_path / "pruned", model, calibration=calibration)
    assert [*tmp_path.iterdir()] == []


def test_an_expert_that_is_not_finite_is_named_as_it_is_on_disk(save_mixture):
    model, name = save_mixture("mixtral"), "model.layers.1.block_sparse_moe.experts.3.w3.weight"
    tensors = load_file(model / WEIGHTS)
    tensors[name][0, 0] = torch.nan
    save_file(tensors, model / WEIGHTS)
    opened = dense_model(Checkpoint.open(model))
    opened.check_layer_finite(0)
    with pytest.raises(InputError, match=rf"{WEIGHTS}: tensor {re.escape(name)} holds NaN or infinite values"):
        opened.check_layer_finite(1)


# ---------------------------------------------------------------- quantized


def pack(folder, experts: torch.Generator) -> None:
    """Put random blocks of mxfp4 in the place of a folder's experts, as gpt-oss is released."""
    tensors = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            count, inputs, outputs = tensor.shape
            grid = count, outputs, inputs // 32
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*grid, 16), dtype=torch.uint8, generator=experts)
            tensors[f"{name}_scales"] = torch.randint(110, 130, grid, dtype=torch.uint8, generator=experts)
        else:
            tensors[name] = tensor
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (folder / "config.json").write_text(json.dumps(config))


def test_a_mixture_in_mxfp4_is_written_as_transformers_dequantizes_it(save_mixture, prune_here, calibrate, tmp_path):
    model, output = save_mixture("gpt_oss", intermediate_size=32, dtype=torch.bfloat16), tmp_path / "pruned"
    calibration = calibrate(model)
    pack(model, torch.Generator().manual_seed(0))
    record = prune_here(output, model, calibration=calibration, method="magnitude", sparsity=0, distill=None)
    assert "The model is stored in mxfp4: it is dequantized to bfloat16 on reading" in " ".join(record.notes)
    assert "quantization" not in (output / "config.json").read_text()
    dequantized = Mxfp4Config(dequantize=True)
    expected = AutoModelForCausalLM.from_pretrained(model, quantization_config=dequantized, dtype=torch.bfloat16)
    found, report = AutoModelForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in expected.state_dict().items())


# ---------------------------------------------------------------- counting


@pytest.mark.parametrize("model_type", [*STORED_APART, *STORED_TOGETHER])
def test_layers_of_a_mixture_take_the_bytes_that_they_have(model_type, save_mixture):
    folder = save_mixture(model_type, dtype=torch.bfloat16)
    tensors = load_file(folder / WEIGHTS)
    wide = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name or "experts" in name}
    save_file(tensors | wide, folder / WEIGHTS)
    config = PruneConfig(model=str(folder), output=folder / "pruned", sparsity=0, sequence_length=16)
    scenario = make_scenario(config, Checkpoint.open(folder), Cluster(), "cpu", {})
    assert scenario.pruned_bytes == scenario.stored_bytes
    assert sum(scenario.stored_bytes) == sum(t.nbytes for n, t in (tensors | wide).items() if ".layers." in n)


def test_each_tensor_on_disk_keeps_its_dtype(save_mixture):
    folder = save_mixture("mixtral", dtype=torch.bfloat16)
    tensors = load_file(folder / WEIGHTS)
    wide = {name: tensor.float() for name, tensor in tensors.items() if ".experts.1.w3." in name}
    save_file(tensors | wide, folder / WEIGHTS)
    model = dense_model(Checkpoint.open(folder))
    assert model.stored_dtypes(0)["mlp.experts.gate_up_proj"] == torch.float32
    assert model.stored_dtypes(0)["mlp.experts.down_proj"] == torch.bfloat16
    written = model.to_disk(0, model.read_layer(0))
    assert all(torch.equal(tensor, (tensors | wide)[name]) for name, tensor in written.items())
    assert {name: tensor.dtype for name, tensor in written.items()} == {
        name: (tensors | wide)[name].dtype for name in written
    }


def test_experts_narrower_than_torch_can_multiply_them_are_refused(save_mixture, prune_here, tmp_path):
    model = save_mixture("mixtral")
    with pytest.raises(InputError, match=r"align is 6: .*mixtral.* multiples of 4 here\. Set --align 4 or a multiple"):
        prune_here(tmp_path / "pruned", model, method="magnitude", sparsity=0.2, distill=None, align=6)
    assert not (tmp_path / "pruned").exists()
    rows, experts = torch.ones(3, 6), torch.ones(2, 6, 8)
    with pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        torch.nn.functional.grouped_mm(rows, experts, offs=torch.tensor([1, 3], dtype=torch.int32))
