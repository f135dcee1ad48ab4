"""The command line: what it prints, what it exits with, and what it refuses in one sentence."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import ray
import yaml
from safetensors.torch import load_file, save_file
from transformers import GPT2Config
from typer.main import get_command
from typer.testing import CliRunner, Result

from distprune import api
from distprune.calibration import CalibrationMetadata, open_calibration, write_calibration
from distprune.cli import app
from distprune.cli.application import COMMANDS
from distprune.config import END_TO_END, DistillConfig, PruneConfig

GIB = 2**30


@pytest.fixture
def distprune():
    """Runs a command line in this process."""

    def run(*arguments) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="distprune")

    return run


@pytest.fixture
def model(dense_path, tmp_path) -> Path:
    """The Llama in a folder of the test's own, to spoil."""
    return shutil.copytree(dense_path, tmp_path / "model")


@pytest.fixture
def calibration(calibration_path, tmp_path) -> Path:
    return Path(shutil.copyfile(calibration_path, tmp_path / "calibration.arrow"))


@pytest.fixture
def assert_refused(distprune, model, calibration, tmp_path):
    """Asserts that `distprune prune` ends with status 2 and one message that holds all the words, and no trace."""

    def check(*words: str, arguments: tuple = (), model: Path = model, calibration: Path = calibration) -> Result:
        before = sorted(os.listdir(tmp_path))
        output = tmp_path / "made" / "pruned"
        result = distprune("prune", model, "-o", output, "--calibration", calibration, "--device", "cpu", *arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        message = result.stderr.strip().splitlines()[-1]
        assert "Traceback" not in result.stderr
        assert message.startswith("distprune: ")
        for word in words:
            assert str(word) in message
        assert sorted(set(os.listdir(tmp_path)) - {"made"}) == before
        assert not list((tmp_path / "made").glob("*"))
        return result

    return check


def edit_weights(folder: Path, change) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


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
    assert result.stderr == "distprune: option 'model' must be given.\n"


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


# ------------------------------------------------------------------ what works


def test_the_configuration_beside_a_result_makes_the_same_bytes_elsewhere(distprune, pruned, digests, tmp_path):
    output = tmp_path / "again"
    result = distprune("prune", "--config", pruned[0] / "distprune_config.yaml", "-o", output, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert digests(output) == digests(pruned[0])
    assert yaml.safe_load((output / "distprune_config.yaml").read_text())["workers"] == 2

    assert "decoder layers" in result.stdout
    assert "forward passes in float32 on cpu" in result.stdout
    assert "peak memory: driver" in result.stdout
    lines = result.stderr.splitlines()
    assert lines[0] == "Checking weights ..."
    assert "Pruning: 4/4" in lines
    assert not [line for line in lines if "\x1b" in line]


def test_options_reach_the_run_under_their_names(distprune, monkeypatch):
    seen = {}
    monkeypatch.setattr(api, "prune", lambda **given: seen.update(given) or sys.exit(0))
    distprune(
        *("prune", "m", "-o", "o", "--option", "k=2", "--option", "decomposition=false", "--propagation", "3"),
        *("--no-overwrite", "--count-embeddings", "--gpus-per-worker", "0.5", "--max-shard-size", "1000"),
    )
    assert seen["options"] == {"k": 2, "decomposition": False}
    assert (seen["model"], seen["output"], seen["propagation"]) == ("m", "o", "3")
    assert (seen["overwrite"], seen["count_embeddings"], seen["sparsity"]) == (False, True, None)
    assert (seen["gpus_per_worker"], seen["max_shard_size"]) == (0.5, 1000)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        (("--distill",), {}),
        (("--no-distill",), False),
        (("--distill-epochs", "3", "--distill-train", "lora"), {"epochs": 3, "train": "lora"}),
        (("--distill", "--distill-calibration", "c"), {"calibration": "c"}),
        (("--distill-objective", "logits"), {"objective": "logits"}),
        (("--no-distill", "--distill-learning-rate", "0.1"), False),
    ],
)
def test_any_option_of_distillation_asks_for_it(distprune, monkeypatch, arguments, expected):
    seen = {}
    monkeypatch.setattr(api, "prune", lambda **given: seen.update(given) or sys.exit(0))
    distprune("prune", "m", "-o", "o", *arguments)
    assert seen["distill"] == expected
    assert not [name for name in seen if name.startswith("distill_")]


@pytest.mark.parametrize("own_text", [True, False])
def test_distillation_without_a_sample_to_hold_out_is_refused(
    assert_refused, calibration, calibration_path, tmp_path_factory, own_text
):
    one = tmp_path_factory.mktemp("small") / "one.arrow"
    whole = open_calibration(calibration_path)
    write_calibration(one, whole.tokens[:1], whole.metadata)
    if own_text:
        assert_refused(one, "2 or more", arguments=("--distill-calibration", one))
    else:
        assert_refused(one, "2 or more", calibration=one, arguments=("--distill",))


def test_inspect_prints_a_row_a_layer(distprune, pruned):
    result = distprune("inspect", pruned[0])
    assert result.exit_code == 0
    rows = [line.strip("│┃ ").split()[0] for line in result.stdout.splitlines() if "/192" in line]
    assert rows == ["0", "1", "2", "3"]
    assert json.loads(distprune("inspect", pruned[0], "--json").stdout)["layout"] == "free"


def test_inspect_of_another_folder_is_refused(distprune, dense_path):
    result = distprune("inspect", dense_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "distprune_run.json: not found. Give the output folder" in result.stderr


def test_an_interrupted_run_exits_with_130(distprune, monkeypatch):
    def interrupted(**given):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "prune", interrupted)
    assert distprune("prune", "m", "-o", "o").exit_code == 130


def test_a_mistake_of_ours_keeps_its_traceback(distprune, monkeypatch):
    def mistaken(**given):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(api, "prune", mistaken)
    result = distprune("prune", "m", "-o", "o")
    assert result.exit_code == 1
    assert isinstance(result.exception, RuntimeError)


def test_the_installed_command_answers_in_a_process_of_its_own(tmp_path):
    command = [sys.executable, "-m", "distprune.cli", "prune", str(tmp_path / "none"), "-o", str(tmp_path / "pruned")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"distprune: {tmp_path / 'none'} does not exist.")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["prune", "plan", "compare"])
def test_help_tells_the_defaults_that_the_configuration_has(command):
    fields = {name: field.default for name, field in PruneConfig.model_fields.items()}
    fields |= {f"distill_{name}": field.default for name, field in DistillConfig.model_fields.items()}
    # Defaults that are None, or switches, are told in words.
    plain = {name: default for name, default in fields.items() if type(default) in (int, float, str)}
    # What else they are with another objective.
    others = {f"distill_{name}": f"; logits: {value}" for name, value in END_TO_END.items()}
    told = {}
    for option in get_command(app).commands[command].params:
        if option.name in plain and option.default is None and (shown := re.search(r"\[(.+)\]$", option.help or "")):
            told[option.name] = shown[1].removesuffix(others.get(option.name, ""))
    assert told.keys() >= {"align", "propagation", "micro_batch", "distill_epochs"}
    assert told == {name: str(plain[name]) for name in told}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_each_command_has_the_file_of_its_name_and_a_help(distprune, command):
    name = command.__name__
    assert command.__module__ == f"distprune.cli.{name}_command"
    shown = distprune(name, "--help")
    assert (shown.exit_code, shown.stdout.split()[1:3]) == (0, ["distprune", name])
    first_words = command.__doc__.split()[:6]
    assert " ".join(first_words) in " ".join(shown.stdout.split())


IN_PROCESS = """
import sys
from distprune.cli import main

sys.argv = ["distprune", "prune", "--help"]
try:
    main()
except SystemExit:
    slow = sorted({"ray", "torch", "transformers"} & sys.modules.keys())
    from transformers.utils.logging import is_progress_bar_enabled

    print(slow, is_progress_bar_enabled(), file=sys.stderr)
"""


def test_help_waits_for_no_slow_import_and_transformers_shows_no_progress_bars():
    done = subprocess.run([sys.executable, "-c", IN_PROCESS], capture_output=True, text=True, check=True)
    assert "Prune a model on Ray" in done.stdout
    assert done.stderr == "[] False\n"


@pytest.mark.parametrize(
    ("arguments", "layout"),
    [
        ((), "free"),
        (("--layout", "free"), "free"),
        (("--layout", "per-layer"), "free"),
        (("--layout", "heterogeneous"), "heterogeneous"),
        (("--layout", "stock"), "stock"),
    ],
)
def test_the_layout_reaches_the_run_and_per_layer_means_free(distprune, monkeypatch, arguments, layout):
    seen = []
    monkeypatch.setattr("distprune.engine.prune", lambda config, *_: seen.append(config) or sys.exit(0))
    assert distprune("prune", "m", "-o", "o", *arguments).exit_code == 0
    assert [config.layout for config in seen] == [layout]


def test_an_unknown_layout_is_refused(distprune):
    result = distprune("prune", "m", "-o", "o", "--layout", "dense")
    assert result.exit_code == 2
    assert "option 'layout' is 'dense'" in result.stderr and "'heterogeneous'" in result.stderr


def test_export_writes_the_file_as_it_is_asked_to_and_tells_its_size(distprune, dense_path, tmp_path):
    gguf = pytest.importorskip("gguf")
    output = tmp_path / "model.gguf"
    result = distprune("export", dense_path, output, "--dtype", "f32", "--pre", "smollm")
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{output}: {output.stat().st_size / 1e9:.2f} GB\n"
    read = gguf.GGUFReader(output)
    assert {tensor.tensor_type.name for tensor in read.tensors} == {"F32"}
    assert read.fields["tokenizer.ggml.pre"].contents() == "smollm"


def test_export_of_a_folder_that_is_no_checkpoint_is_refused(distprune, tmp_path):
    result = distprune("export", tmp_path / "none", tmp_path / "model.gguf")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "none is not a folder" in result.stderr
    assert os.listdir(tmp_path) == []


def test_export_without_the_gguf_package_is_refused(distprune, monkeypatch, tmp_path):
    monkeypatch.setattr("distprune.cli.export_command.find_spec", lambda name: None)
    result = distprune("export", tmp_path, tmp_path / "model.gguf")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "needs the gguf package" in result.stderr


def test_convert_of_a_checkpoint_that_is_no_earlier_version_s_is_refused(distprune, dense_path, tmp_path):
    result = distprune("convert", dense_path, tmp_path / "new")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "nothing to convert" in result.stderr
    assert os.listdir(tmp_path) == []


def test_convert_tells_what_it_wrote(distprune, monkeypatch):
    asked = []
    monkeypatch.setattr("distprune.export.convert.convert", lambda *folders: asked.append(folders))
    result = distprune("convert", "old", "new")
    assert (result.exit_code, result.stdout) == (0, "new: converted from old\n")
    assert asked == [(Path("old"), Path("new"))]


# ------------------------------------------------------------------ names, streams and signals


def ended(*arguments, code: str = "from distprune.cli import main; main()", **options) -> subprocess.CompletedProcess:
    """A command in a process of its own, whose streams take ASCII alone."""
    command = [sys.executable, "-c", code, *map(os.fsencode, arguments)]
    return subprocess.run(command, check=False, env=os.environ | {"PYTHONIOENCODING": "ascii"}, **options)


def prune_arguments(model: Path, calibration: Path, output: Path) -> list:
    options = {"-o": output, "--calibration": calibration, "--method": "magnitude", "--workers": 1, "--device": "cpu"}
    given = [str(word) for option in options.items() for word in option]
    return ["prune", str(model), *given, "--address", ray.get_runtime_context().gcs_address]


def test_names_that_standard_output_cannot_take_are_escaped(dense_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs to the sea. " * 100)
    output = os.fsdecode(os.fsencode(tmp_path) + "/größe".encode() + b"\xff.arrow")
    options = "--samples", "2", "--sequence-length", "8"
    done = ended("calibrate", str(dense_path), "--text", str(text), "-o", output, *options, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"gr\xf6\xdfe\udcff.arrow: 2 windows of 8 tokens" in done.stdout.replace(rb"\xc3\xb6", rb"\xf6")


def test_an_output_that_is_not_utf8_is_refused(distprune, model, calibration, tmp_path):
    output = os.fsdecode(os.fsencode(tmp_path) + b"/b\xff")
    result = distprune("prune", model, "-o", output, "--calibration", calibration)
    assert result.exit_code == 2
    assert "/b\\xff: is not UTF-8" in result.stderr and "choose another" in result.stderr


def test_a_run_ends_well_whatever_its_name_and_although_its_report_cannot_be_written(
    ray_cluster, model, calibration, tmp_path
):
    output = tmp_path / "größe-出力"
    with open("/dev/full", "w") as full:
        done = ended(*prune_arguments(model, calibration, output), stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"standard output can't be told of the run") == 1 and b"Traceback" not in done.stderr
    assert (output / "model.safetensors").is_file()


SIGNALLED = """
import atexit, os, signal, sys
from distprune import api, cli
from distprune.engine import driver

def signal_and(act):
    def signalled(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return act(*arguments, **options)
    return signalled

match sys.argv.pop():
    case "publishing":
        driver.publish = signal_and(driver.publish)
    case "leaving":
        atexit.register(signal_and(lambda: None))
    case "beginning":
        api.prune = signal_and(api.prune)
cli.main()
"""


@pytest.mark.parametrize("when", ["publishing", "leaving", "beginning"])
def test_a_run_that_sigterm_ends_ends_with_the_status_that_it_has_come_to(
    ray_cluster, model, calibration, tmp_path, when
):
    output = tmp_path / "pruned"
    done = ended(*prune_arguments(model, calibration, output), when, code=SIGNALLED, capture_output=True)
    if when == "beginning":
        assert done.returncode == 130 and b"distprune: interrupted." in done.stderr
        assert not output.exists()
    else:
        assert done.returncode == 0, done.stderr
        assert (output / "model.safetensors").is_file()
        assert not (tmp_path / "pruned.partial").exists()
