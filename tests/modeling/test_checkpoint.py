"""Saving and loading, with this package and from the checkpoint folder alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from distprune.modeling import AUTO_MAP, PrunedForCausalLM, PrunedModel, copy_modeling_files

MODELING_FILES = {"configuration_distprune.py", "modeling_distprune.py"}

# Run by a fresh interpreter in which `import distprune` fails: CHECKPOINT, RESAVED, LOGITS.
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

checkpoint, resaved, logits = sys.argv[1:]
tokens = torch.arange(2, 20).unsqueeze(0)
model = AutoModelForCausalLM.from_pretrained(checkpoint, trust_remote_code=True).eval()
base = AutoModel.from_pretrained(checkpoint, trust_remote_code=True).eval()
with torch.no_grad():
    found = {"logits": model(tokens).logits, "hidden": base(tokens).last_hidden_state}
found["generated"] = model.generate(tokens, max_new_tokens=8, do_sample=False)
save_file(found, logits)
model.save_pretrained(resaved)
"""


@pytest.fixture
def checkpoint(pruned_model, tmp_path):
    """A pruned model and the folder where it is saved, with the whole AUTO_MAP in its config.json."""
    return save(pruned_model(), tmp_path)


@pytest.fixture(params=["pruned_model", "reduced_model"])
def any_checkpoint(request, tmp_path):
    """The same of a model with narrower layers, and of one with layers that lack rotary pairs, attention or FFN."""
    return save(request.getfixturevalue(request.param)(), tmp_path)


def save(model: PrunedForCausalLM, tmp_path: Path) -> tuple[PrunedForCausalLM, Path]:
    model.save_pretrained(tmp_path / "saved")
    config_file = tmp_path / "saved" / "config.json"
    config = json.loads(config_file.read_text()) | {"auto_map": AUTO_MAP}
    config_file.write_text(json.dumps(config))
    return model, tmp_path / "saved"


def assert_same_parameters(actual: torch.nn.Module, expected: torch.nn.Module) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_copied_files_are_those_of_the_auto_map(tmp_path):
    copies = copy_modeling_files(tmp_path)
    assert {path.name for path in copies} == MODELING_FILES == {path.name for path in tmp_path.iterdir()}
    for auto_class, reference in AUTO_MAP.items():
        module, class_name = reference.split(".")
        assert f"class {class_name}(" in (tmp_path / f"{module}.py").read_text(), auto_class


def test_save_pretrained_writes_the_code_and_the_auto_map(pruned_model, tmp_path):
    pruned_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= MODELING_FILES
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.items() <= AUTO_MAP.items()
    assert auto_map.keys() >= {"AutoConfig", "AutoModelForCausalLM"}


def test_tensor_names_are_llamas(checkpoint):
    _, folder = checkpoint
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
    assert names >= {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert {name.removeprefix("model.layers.0.") for name in names if name.startswith("model.layers.0.")} == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.right.q_proj.weight",
        "self_attn.left.q_proj.weight",
        "self_attn.right.k_proj.weight",
        "self_attn.left.k_proj.weight",
        "self_attn.v_proj.weight",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "mlp.right.calibration.weight",
        "mlp.left.calibration.weight",
    }


def test_biases_of_single_layers_are_saved(checkpoint):
    _, folder = checkpoint
    biases = {name for name in load_file(folder / "model.safetensors") if name.endswith(".bias")}
    assert biases == {
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.2.self_attn.o_proj.bias",
        "model.layers.2.mlp.down_proj.bias",
    }


def test_auto_classes_load_it_without_trusting_remote_code(any_checkpoint):
    model, folder = any_checkpoint
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert type(loaded) is PrunedForCausalLM
    assert_same_parameters(loaded, model)
    base = AutoModel.from_pretrained(folder)
    assert type(base) is PrunedModel
    assert_same_parameters(base, model.model)


def test_the_folder_alone_is_enough_with_trust_remote_code(any_checkpoint, tmp_path):
    model, folder = any_checkpoint
    found_file, resaved = tmp_path / "found.safetensors", tmp_path / "resaved"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", LOAD_WITHOUT_THE_PACKAGE, str(folder), str(resaved), str(found_file)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr

    found = load_file(found_file)
    ids = torch.arange(2, 20).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(ids).logits)
        torch.testing.assert_close(found["hidden"], model.model(ids).last_hidden_state)
    assert found["generated"].tolist() == model.generate(ids, max_new_tokens=8, do_sample=False).tolist()
    # What was loaded from a folder can be saved to another, code and all.
    assert {path.name for path in resaved.iterdir()} >= MODELING_FILES
    assert AutoConfig.from_pretrained(resaved).auto_map == AUTO_MAP
    assert_same_parameters(AutoModelForCausalLM.from_pretrained(resaved), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@torch.no_grad()
def test_dtype_argument_sets_the_dtype_of_every_parameter(checkpoint, tokens, dtype):
    model, folder = checkpoint
    expected = model(tokens).logits
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert_same_parameters(loaded, model.to(dtype))
    # Rotary frequencies stay exact: rounded ones would drift with the position.
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    logits = loaded(tokens).logits
    assert logits.dtype == dtype
    assert (logits.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("tied", [False, True])
@torch.no_grad()
def test_embeddings_stay_tied_or_untied_through_a_round_trip(pruned_model, tokens, tmp_path, tied):
    model = pruned_model(tie_word_embeddings=tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert ("lm_head.weight" in set(file.keys())) != tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


@torch.no_grad()
def test_device_map_can_leave_whole_layers_on_disk(checkpoint, tokens, tmp_path):
    model, folder = checkpoint
    in_memory = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(in_memory, "cpu") | {"model.layers.1": "disk", "model.layers.2": "disk"}
    loaded = AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    assert {parameter.device.type for parameter in loaded.model.layers[2].parameters()} == {"meta"}
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_layers_are_not_split_between_devices(pruned_config):
    with torch.device("meta"):
        model = PrunedForCausalLM(pruned_config())
    assert list(model._no_split_modules) == ["PrunedDecoderLayer"]
