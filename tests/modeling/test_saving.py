"""Saving and loading: with this package, from the folder alone, and what happens without either."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from pruned_checkpoints import PrunedCheckpoint
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from distprune.export.output_config import modeling_files
from distprune.modeling import load

# Run by a fresh interpreter in which `import distprune` fails: CHECKPOINT, RESAVED, FOUND.
LOAD_WITHOUT_THE_PACKAGE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "distprune":
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM

checkpoint, resaved, found = sys.argv[1:]
tokens = torch.arange(3, 20).unsqueeze(0)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
print(type(model).__name__, type(base).__name__)
with torch.no_grad():
    outputs = {"logits": model(tokens).logits, "hidden": base(tokens).last_hidden_state}
outputs["generated"] = model.generate(tokens, max_new_tokens=8, do_sample=False)
save_file(outputs, found)
model.save_pretrained(resaved)
"""


def assert_same_parameters(found: torch.nn.Module, expected: torch.nn.Module) -> None:
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_loading_needs_no_trust_and_keeps_the_bases_type(checkpoint):
    model = load(checkpoint.folder)
    is_stock = checkpoint.layout == "stock"
    assert type(model).__name__ == ("LlamaForCausalLM" if is_stock else "PrunedLlamaForCausalLM")
    assert isinstance(model, LlamaForCausalLM)
    assert type(AutoConfig.from_pretrained(checkpoint.folder)) is LlamaConfig
    assert model.config.model_type == "llama"


@pytest.mark.parametrize("auto", [AutoModel, AutoModelForCausalLM])
def test_without_trust_there_is_an_error_and_no_random_weights(pruned, auto):
    with pytest.raises(KeyError, match=r"open it with trust_remote_code=True, or with distprune\.load"):
        auto.from_pretrained(pruned("free").folder)
    with pytest.raises(RuntimeError, match="mismatched"):
        auto.from_pretrained(pruned("heterogeneous").folder)


def test_a_stock_checkpoint_is_transformers_own(pruned, tokens):
    checkpoint = pruned("stock")
    model = AutoModelForCausalLM.from_pretrained(checkpoint.folder)
    assert type(model) is LlamaForCausalLM
    assert not list(checkpoint.folder.glob("*.py"))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, checkpoint.oracle(tokens).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["heterogeneous", "free"])
def test_the_folder_alone_is_enough_with_trust_remote_code(pruned, layout, tmp_path):
    checkpoint = pruned(layout)
    found_file, resaved = tmp_path / "found.safetensors", tmp_path / "resaved"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(checkpoint.folder), str(resaved), str(found_file)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["PrunedLlamaForCausalLM", "PrunedLlamaModel"]
    found, ids = load_file(found_file), torch.arange(3, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], checkpoint.oracle(ids).logits, atol=5e-5, rtol=1e-4)
        hidden = checkpoint.oracle.model(ids).last_hidden_state
    torch.testing.assert_close(found["hidden"], hidden, atol=5e-5, rtol=1e-4)
    assert found["generated"].tolist() == checkpoint.oracle.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    assert_saved_again(checkpoint, resaved)


def test_a_loaded_model_saves_its_code_and_configuration_again(checkpoint, tmp_path):
    load(checkpoint.folder).save_pretrained(tmp_path)
    assert_saved_again(checkpoint, tmp_path)


def assert_saved_again(checkpoint: PrunedCheckpoint, folder) -> None:
    assert {file.name for file in folder.glob("*.py")} == modeling_files(checkpoint.layout).keys()
    before, after = (json.loads((place / "config.json").read_text()) for place in (checkpoint.folder, folder))
    assert after == before
    assert_same_parameters(load(folder), load(checkpoint.folder))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dtype_argument_sets_the_dtype_of_every_parameter(checkpoint, tokens, dtype):
    model = load(checkpoint.folder, dtype=dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    # Rotary frequencies stay exact: rounded ones would drift with the position.
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    found, expected = model(tokens).logits, checkpoint.oracle(tokens).logits
    assert found.dtype == dtype
    assert (found.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("tied", [False, True])
def test_embeddings_stay_tied_or_untied_through_a_round_trip(pruned, tokens, tmp_path, tied):
    model = load(pruned("free", tie_word_embeddings=tied).folder)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != tied
    again = load(tmp_path)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert_same_parameters(again, model)


@torch.no_grad()
def test_whole_layers_can_be_left_on_disk(checkpoint, tokens, tmp_path):
    in_memory = [
        "model.embed_tokens",
        "model.norm",
        "model.rotary_emb",
        "lm_head",
        *(f"model.layers.{i}" for i in (0, 4, 5)),
    ]
    device_map = dict.fromkeys(in_memory, "cpu") | {f"model.layers.{index}": "disk" for index in (1, 2, 3)}
    loaded = load(checkpoint.folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in loaded.model.layers[2].parameters()} == {"meta"}
    torch.testing.assert_close(loaded(tokens).logits, checkpoint.oracle(tokens).logits, atol=5e-5, rtol=1e-4)


def test_layers_are_not_split_between_devices(checkpoint):
    model = load(checkpoint.folder, device_map="auto")
    assert set(model._no_split_modules) == {"LlamaDecoderLayer"}
    assert {type(layer).__name__ for layer in model.model.layers} == {"LlamaDecoderLayer"}


def test_a_model_made_from_its_configuration_is_initialized(pruned):
    loaded = load(pruned("free").folder)
    model = type(loaded)(loaded.config)
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all() and parameter.abs().max() < 2, name


def test_only_layers_of_whole_projections_are_sharded(pruned):
    plans = {layout: load(pruned(layout).folder)._tp_plan for layout in ("stock", "heterogeneous", "free")}
    assert plans["heterogeneous"] == plans["stock"]
    assert [name for name in plans["free"] if "layers" in name] == []
