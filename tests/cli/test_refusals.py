"""What `distprune prune` refuses, in one message and without a trace."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

from distprune import api
from distprune.calibration import CalibrationMetadata, open_calibration, write_calibration

GIB = 2**30


def edit_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


# ------------------------------------------------------------------ latency tables


def test_a_latency_without_a_table_is_refused(assert_refused):
    assert_refused("--target latency", "needs --latency-table", arguments=("--target", "latency"))


def test_a_table_that_is_not_there_is_refused(assert_refused, tmp_path):
    none = tmp_path / "none.json"
    arguments = ("--target", "latency", "--latency-table", none)
    assert_refused(none, "no such latency table", "measure-latency", arguments=arguments)


# ------------------------------------------------------------------ bad models


def test_a_missing_folder_is_refused(assert_refused, tmp_path):
    assert_refused(tmp_path / "none", "does not exist", "Give a checkpoint folder", model=tmp_path / "none")


def test_a_truncated_file_is_refused(assert_refused, model):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert_refused(file, "truncated", "Download it again")


def test_an_index_that_names_a_missing_shard_is_refused(assert_refused, save_model):
    folder = save_model(max_shard_size="60KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert_refused("model.safetensors.index.json", shard.name, "Download", model=folder)


def test_shapes_that_are_not_those_of_the_config_are_refused(assert_refused, model):
    edit_config(model, intermediate_size=200)
    assert_refused("model.layers.0.mlp.gate_proj.weight", "(192, 64)", "expected (200, 64)", "Check that config.json")


def test_a_missing_tensor_is_refused(assert_refused, model):
    edit_weights(model, lambda tensors: tensors.pop("model.layers.3.self_attn.q_proj.weight"))
    assert_refused(model, "lacks 1 tensor", "model.layers.3.self_attn.q_proj.weight", "Check that config.json")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_before_the_dense_pass(assert_refused, model, ray_cluster, name, value):
    edit_weights(model, lambda tensors: tensors[name].view(-1)[7].fill_(value))
    words = model / "model.safetensors", name, "NaN or infinite", "Download"
    result = assert_refused(*words, arguments=("--workers", 1))
    assert "Checking weights" in result.stderr
    assert "Dense pass" not in result.stderr


def test_an_unknown_architecture_is_refused(assert_refused, model):
    GPT2Config().save_pretrained(model)
    assert_refused("model_type 'gpt2'", "docs/families.md")


def test_too_little_disk_is_refused(assert_refused, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(GIB, GIB, 1000))
    assert_refused("made/pruned needs", "has 0.00 GB free", "Free some space")


# ------------------------------------------------------------------ bad calibration sets


def write_tokens(path: Path, like: Path, *, token: int = 0, length: int | None = None, tokenizer: str | None = None):
    source = open_calibration(like)
    tokens = source.tokens.copy()
    tokens[2, 3] = token
    if length:
        tokens = tokens.repeat(length // tokens.shape[1], axis=1)
    metadata = source.metadata
    write_calibration(
        path,
        tokens,
        CalibrationMetadata(
            tokenizer or metadata.tokenizer_fingerprint, metadata.vocab_size, tokens.shape[1], ("text",), 0, False
        ),
    )


def test_a_calibration_set_of_another_tokenizer_is_refused(assert_refused, calibration, calibration_path):
    write_tokens(calibration, calibration_path, tokenizer="another")
    assert_refused(calibration, "another tokenizer", "run `distprune calibrate")


@pytest.mark.parametrize("token", [-1, 323, 10**6])
def test_ids_outside_the_vocabulary_are_refused(assert_refused, calibration, calibration_path, token):
    write_tokens(calibration, calibration_path, token=token)
    assert_refused(calibration, f"row 2 holds the token id {token}", "323 tokens", "run `distprune calibrate")


def test_windows_longer_than_the_context_are_refused(assert_refused, calibration, calibration_path):
    write_tokens(calibration, calibration_path, length=128)
    assert_refused(calibration, "windows of 128 tokens exceed", "context of 64", "shorter --sequence-length")


def test_a_calibration_set_that_is_no_arrow_file_is_refused(assert_refused, calibration):
    calibration.write_text("The river runs down to the sea.\n" * 9)
    assert_refused(calibration, "is not a whole Arrow file", "`distprune calibrate`")


def test_a_missing_calibration_set_is_refused(assert_refused, tmp_path):
    assert_refused(tmp_path / "none.arrow", "no such calibration set", calibration=tmp_path / "none.arrow")


# ------------------------------------------------------------------ bad options


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--method", "olica", "--sparsity", 0.8], ["sparsity 0.8 can't be reached", "lower --sparsity"]),
        (["--sparsity", 1.2], ["option 'sparsity' is 1.2", "less than 1"]),
        (["--sparsity", -0.1], ["option 'sparsity' is -0.1", "greater than or equal to 0"]),
        (["--method", "magic"], ["method 'magic' does not exist", "olica"]),
        (["--method", "olica", "--option", "kk=2"], ["option 'kk' of method olica", "calibrated_layers"]),
        (["--method", "olica", "--option", "k=-1"], ["option 'k' of method olica", "greater than or equal to 0"]),
        (["--method", "olica", "--option", "k=many"], ["option 'k' of method olica", "number"]),
        (["--option", "k"], ["--option k: write NAME=VALUE"]),
        (["--option", "k=[1"], ["--option k=[1: '[1' is not a YAML value"]),
        (["--propagation", 0], ["option 'propagation' is '0'", "from 1, or 'full'"]),
        (["--propagation", "some"], ["option 'propagation' is 'some'", "from 1, or 'full'"]),
        (["--propagation", "²"], ["option 'propagation' is '²'", "from 1, or 'full'"]),
        (["--dtype", "int8"], ["option 'dtype' is 'int8'", "'bfloat16'"]),
        (["--threads-per-worker", 1000], ["no worker fits on any node", "Lower --threads-per-worker"]),
        (["--config", "none.yaml"], ["none.yaml: can't be read", "Check --config"]),
        (["--revision", "main"], ["is not on the hub", "Leave the revision out"]),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0]).startswith("--") else "",
)
def test_unusable_options_are_refused(assert_refused, ray_cluster, arguments, words):
    assert_refused(*words, arguments=arguments)


def test_unknown_names_in_the_yaml_file_are_refused(assert_refused, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("sparsty: 0.2\n")
    assert_refused(f"{file}: 'sparsty' is not an option", "sparsity", arguments=("--config", file))


def test_a_command_line_without_a_model_is_refused(distprune):
    result = distprune("prune")
    assert result.exit_code == 2
    assert result.stderr == (
        "distprune: option 'model' must be given: the first argument, a folder, hub id or .gguf file.\n"
    )


def test_an_existing_output_is_refused_without_overwrite_and_replaced_with_it(
    run, distprune, pruned, digests, tmp_path
):
    output = shutil.copytree(pruned[0], tmp_path / "pruned")
    options = yaml.safe_load((output / "distprune_config.yaml").read_text())
    arguments = "prune", options["model"], "-o", output, "--calibration", options["calibration"], "--workers", 1
    arguments += "--device", "cpu"

    refused = distprune(*arguments)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert f"{output} exists" in refused.stderr
    assert digests(output) == digests(pruned[0])

    replaced = distprune(*arguments, "--overwrite", "--sparsity", 0)
    assert replaced.exit_code == 0, replaced.output
    assert api.inspect(output).layout == "stock"
    assert os.listdir(tmp_path) == ["pruned"]


def test_a_folder_that_is_no_checkpoint_is_never_overwritten(distprune, model, calibration, tmp_path):
    output = tmp_path / "documents"
    output.mkdir()
    (output / "thesis.tex").write_text("years of work")
    result = distprune("prune", model, "-o", output, "--calibration", calibration, "--overwrite")
    assert result.exit_code == 2
    assert "is not overwritten" in result.stderr
    assert (output / "thesis.tex").read_text() == "years of work"
