"""What the commands print and what they exit with."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from distprune import api
from distprune.calibration import open_calibration, write_calibration
from distprune.checkpoint import hub_access
from distprune.cli import app
from distprune.cli.application import COMMANDS
from distprune.config import END_TO_END, DistillConfig, PruneConfig
from distprune.latency import LatencyTable


def test_the_configuration_beside_a_result_makes_the_same_bytes_elsewhere(distprune, pruned, digests, tmp_path):
    output = tmp_path / "again"
    result = distprune("prune", "--config", pruned[0] / "distprune_config.yaml", "-o", output, "--workers", 2)
    assert result.exit_code == 0, result.output
    assert digests(output) == digests(pruned[0])
    assert yaml.safe_load((output / "distprune_config.yaml").read_text())["workers"] == 2

    assert "decoder layers" in result.stdout
    assert "forward passes in float32 on cpu" in result.stdout
    assert "peak memory: driver" in result.stdout
    assert result.stdout.splitlines()[-1] == (
        f"The checkpoint is in {output}; its report, for a browser, is {output / 'report.html'}"
    )
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
    name = command.__name__.replace("_", "-")
    assert command.__module__ == f"distprune.cli.{command.__name__}_command"
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


def test_a_card_is_written_anew_with_results(distprune, pruned, tmp_path):
    folder = shutil.copytree(pruned[0], tmp_path / "pruned")
    (folder / "README.md").unlink()
    row = {"model": str(folder), "perplexity": None, "tasks": {"quiz": {"acc": 0.4}}, "speed": None}
    (tmp_path / "results.json").write_text(json.dumps([row]))
    options = ("--evaluation", tmp_path / "results.json", "--base-model", "org/model")
    result = distprune("card", folder, *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{folder}/README.md: written\n"
    written = (folder / "README.md").read_text()
    assert "base_model: org/model" in written and "| quiz, acc |  | 0.4000 |" in written
    (tmp_path / "results.json").write_text("perplexity: 3")
    refused = distprune("card", folder, *options)
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "results.json: the file: Invalid JSON" in refused.stderr


def test_a_push_that_the_token_does_not_allow_is_refused_first(distprune, tmp_path, monkeypatch):
    monkeypatch.setattr(hub_access, "get_token", lambda: None)
    result = distprune("prune", "no-model", "-o", tmp_path / "pruned", "--push-to-hub", "org/model")
    assert result.exit_code == 2
    assert "hf://org/model: the hub asks for a token. Set HF_TOKEN" in result.stderr


def test_measure_latency_writes_a_table_that_a_run_can_plan_with(distprune, dense_path, tmp_path):
    file = tmp_path / "made" / "table.json"
    options = ("--batch", "1,2", "--prompt", 16, "--new", 4, "--rounds", 1, "--device", "cpu", "--dtype", "float32")
    result = distprune("measure-latency", dense_path, "-o", file, *options)
    assert result.exit_code == 0, result.output
    table = LatencyTable.read(file)
    assert [(each.kind, each.batch, each.tokens) for each in table.workloads] == [
        ("prefill", 1, 16),
        ("decode", 1, 18),
        ("prefill", 2, 16),
        ("decode", 2, 18),
    ]
    assert result.stdout.count("ms a token") == 4 and f"{file}: latencies on {table.conditions}" in result.stdout
    planned = distprune(
        *("plan", dense_path, "--target", "latency", "--latency-table", file, "--sparsity", 0.3),
        *("--device", "cpu", "--sequence-length", 16),
    )
    assert planned.exit_code == 0, planned.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "one"), "--batch one: write numbers"),
        (("--prompt", 100), "--prompt 100 and --new 32: are 132 tokens together, and the model takes 64"),
        (("--device", "tpu-7"), "--device tpu-7: is no device"),
    ],
)
def test_a_measurement_that_can_not_be_made_is_refused(distprune, dense_path, tmp_path, options, message):
    result = distprune("measure-latency", dense_path, "-o", tmp_path / "table.json", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr
    assert not (tmp_path / "table.json").exists()


def test_report_draws_the_report_and_tells_where(distprune, pruned, tmp_path):
    result = distprune("report", pruned[0], "--output", tmp_path / "report.html")
    assert (result.exit_code, result.stdout.replace("\n", "")) == (0, str(tmp_path / "report.html"))
    assert (tmp_path / "report.html").read_text() == (pruned[0] / "report.html").read_text()


def test_report_of_another_folder_is_refused(distprune, dense_path):
    result = distprune("report", dense_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "distprune_run.json: not found. Give the output folder" in result.stderr
    assert not (dense_path / "report.html").exists()
