"""A model in fp8 is pruned as the one that it is dequantized to."""

from __future__ import annotations

import json

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from distprune.checkpoint import Checkpoint, copy_side_files

WEIGHTS = "model.safetensors"


def test_a_run_on_fp8_writes_what_one_on_its_dequantized_copy_writes(run, save_model, calibrate, digests, tmp_path):
    model = save_model(num_hidden_layers=2, dtype=torch.bfloat16)
    tensors = load_file(model / WEIGHTS)
    for name in [name for name in tensors if "_proj." in name]:
        scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
        tensors[name] = (tensors[name].float() / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    weights = {"type": "float", "num_bits": 8, "strategy": "channel"}
    scheme = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": weights}}}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": scheme}))

    plain = tmp_path / "plain"
    plain.mkdir()
    copy_side_files(model, plain)
    (plain / "config.json").write_text(json.dumps(config))
    checkpoint = Checkpoint.open(model)
    save_file(checkpoint.read(checkpoint.tensors), plain / WEIGHTS, metadata={"format": "pt"})

    calibration = calibrate(plain)
    pruned, _ = run(model, calibration=calibration, sparsity=0.3)
    expected, _ = run(plain, calibration=calibration, sparsity=0.3)
    assert digests(pruned) == digests(expected)
    assert "quantization" not in (pruned / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
