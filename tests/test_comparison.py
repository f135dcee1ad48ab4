"""A comparison: its rows are those of separate runs, wrong input ends it at once, and no finished row is lost."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from html_pages import read_page
from rich.console import Console
from typer.testing import CliRunner, Result

from distprune import InputError, api, compare, inspect
from distprune.calibration import open_calibration
from distprune.cli import app
from distprune.comparison import ComparisonRow, Evaluation
from distprune.comparison import comparing as comparison_driver
from distprune.comparison.scoring import evaluate_apart
from distprune.config import PruneConfig
from distprune.engine.telemetry.process_memory import PeakMemory
from distprune.engine.telemetry.progress import Progress
from distprune.evaluation import evaluate_perplexity
from distprune.reporting import comparison_table

TEXT = "The river runs down to the sea, and a pruner mends what is left of the model. " * 12
MIB, GIB = 2**20, 2**30


@pytest.fixture(scope="session")
def text_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def evaluate_here():
    """Evaluations happen in this process, for importing torch takes a new one seconds."""

    def evaluate(model: Path, evaluation: Evaluation, config: PruneConfig) -> float:
        result = evaluate_perplexity(
            model, evaluation.text, evaluation.length, evaluation.max_tokens, config.micro_batch
        )
        return result.perplexity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison_driver, "evaluate_apart", evaluate)
        yield


@pytest.fixture
def scratch(tmp_path, monkeypatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.fixture
def comparison(ray_cluster, evaluate_here, dense_path, calibration_path, text_path, scratch) -> Callable[..., list]:
    """Compares Olica and OOPS at 20% and 30% on the Llama, unless told otherwise."""

    def run(model: Path = dense_path, **changes) -> list[ComparisonRow]:
        options = {
            "methods": ["olica", "oops"],
            "sparsities": [0.2, 0.3],
            "text": text_path,
            "evaluation_length": 16,
            "calibration": calibration_path,
            "device": "cpu",
            "workers": 1,
            "micro_batch": 3,
        }
        return compare(str(model), **options | changes)

    return run


# ------------------------------------------------------------------ rows


def test_rows_are_those_of_separate_runs_with_the_dense_model_first(comparison, run, dense_path, text_path, scratch):
    dense, *rows = comparison(options={"oops": {"outlier_span": 0.0}})
    assert (dense.method, dense.sparsity_asked, dense.sparsity_reached) == ("dense", 0, 0)
    assert (dense.seconds, dense.peak_memory) == (None, None)
    assert dense.perplexity == pytest.approx(evaluate_perplexity(dense_path, text_path, 16).perplexity, rel=1e-6)

    asked = [(row.method, row.sparsity_asked) for row in rows]
    assert asked == [("olica", 0.2), ("olica", 0.3), ("oops", 0.2), ("oops", 0.3)]
    for row in rows:
        options = {"outlier_span": 0.0} if row.method == "oops" else {}
        folder, record = run(method=row.method, sparsity=row.sparsity_asked, options=options)
        assert row.perplexity == evaluate_perplexity(folder, text_path, 16, batch_size=3).perplexity
        assert row.decoder_parameters == record.decoder_parameters_after
        assert row.total_parameters == record.total_parameters_after
        assert row.sparsity_reached == record.decoder_sparsity
        assert dense.decoder_parameters == record.decoder_parameters_before
        assert dense.total_parameters == record.total_parameters_before
        assert row.seconds > 0
        assert row.peak_memory.resident > 0
    assert os.listdir(scratch) == []


def test_the_report_shows_the_rows_and_lies_with_the_checkpoints_or_where_it_is_asked_for(comparison, tmp_path):
    common = {"methods": ["olica"], "sparsities": [0.2]}
    rows = comparison(**common, keep=tmp_path / "kept")
    for row in rows:
        points = read_page(tmp_path / "kept" / "report.html").trace("pareto", row.method)
        assert (points["x"], points["y"]) == ([row.total_parameters], [pytest.approx(row.perplexity)])
    assert (tmp_path / "kept" / "olica-20" / "report.html").is_file()
    comparison(**common, report=tmp_path / "rows.html")
    assert [file.name for file in tmp_path.glob("*.html")] == ["rows.html"]


def test_a_report_where_none_can_be_is_refused_at_once(comparison, scratch, tmp_path):
    for file in (tmp_path / "none" / "rows.html", tmp_path):
        with pytest.raises(InputError, match=r"--report .*: give a file in a folder that exists"):
            comparison(report=file)
    assert os.listdir(scratch) == []


def test_with_embeddings_counted_the_fraction_reached_is_of_all_parameters(comparison):
    dense, row = comparison(methods=["olica"], sparsities=[0.2], count_embeddings=True)
    assert row.sparsity_reached == 1 - row.total_parameters / dense.total_parameters
    assert row.sparsity_reached == pytest.approx(0.2, abs=0.01)


def test_only_the_most_loaded_process_counts(pruned, monkeypatch):
    loads = [PeakMemory(3, 0), PeakMemory(5, 20), PeakMemory(4, 30)]
    record = type("Record", (), {"peak_memory_driver": loads[0], "peak_memory_workers": loads[1:]})
    assert comparison_driver.most_loaded(record) == PeakMemory(5, 30)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="only Linux can forget a peak")
def test_a_run_is_not_blamed_for_memory_taken_before_it():
    """In a process of its own, whose memory nothing else takes or keeps."""
    code = """
import torch
from distprune.comparison import comparing
from distprune.engine.telemetry.process_memory import peak_memory
torch.ones(400 * 2**20, dtype=torch.uint8)
before = peak_memory().resident
comparing.forget_peak_memory()
print(before - peak_memory().resident)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(told.split()[-1]) > 300 * MIB


def test_every_run_is_told_of_by_name_and_evaluated_on_the_way(comparison):
    heard = []

    class Hear(Progress):
        def stage(self, name, total, done=0):
            heard.append(name)

        def note(self, text):
            heard.append(text)

    dense, row = comparison(methods=["oops"], sparsities=[0.25], progress=Hear)
    passed_over = "Dense pass", "Pruning", "Copying embedding and head", "Assembling"
    assert [text for text in heard if text not in passed_over] == [
        "Checking weights",
        "Evaluating",
        f"perplexity {dense.perplexity:.2f}",
        "oops at 25% (1 of 1)",
        "Checking weights",
        "Evaluating",
        f"perplexity {row.perplexity:.2f}",
    ]


# ------------------------------------------------------------------ calibration and results


def test_own_samples_are_drawn_once_and_stay_with_the_results_that_are_kept(comparison, run, calls, digests, tmp_path):
    own = {"calibration": None, "samples": 4, "sequence_length": 12, "seed": 5}
    keep = tmp_path / "kept"
    comparison(methods=["oops", "olica"], sparsities=[0.125], keep=keep, **own)
    assert [kind for kind, _ in calls].count("write_own_samples") == 1
    assert sorted(os.listdir(keep)) == ["calibration.arrow", "olica-12.5", "oops-12.5", "report.html"]

    alone, _ = run(method="oops", sparsity=0.125, **own)
    kept, written = (open_calibration(path / "calibration.arrow") for path in (keep, alone))
    assert kept.fingerprint == written.fingerprint
    assert digests(keep / "oops-12.5") == digests(alone)


def test_kept_results_are_refused_when_they_are_there_already_and_replaced_when_that_is_allowed(
    comparison, calls, digests, tmp_path, scratch
):
    changes = {"methods": ["oops"], "sparsities": [0.2, 0.3], "keep": tmp_path / "kept"}
    comparison(**changes)
    before = digests(tmp_path / "kept" / "oops-30")
    shutil.rmtree(tmp_path / "kept" / "oops-20")
    calls.clear()
    with pytest.raises(InputError, match=r"oops at 30%: .*oops-30 exists"):
        comparison(**changes)
    assert calls == []
    assert sorted(os.listdir(tmp_path / "kept")) == ["oops-30", "report.html"]

    comparison(**changes, overwrite=True, options={"oops": {"selection": "score"}})
    assert digests(tmp_path / "kept" / "oops-30") != before
    assert inspect(tmp_path / "kept" / "oops-20").options["selection"] == "score"
    assert os.listdir(scratch) == []


def test_common_options_may_stand_in_a_yaml_file(comparison, tmp_path):
    file = tmp_path / "common.yaml"
    file.write_text("align: 16\npropagation: 1\n")
    keep = tmp_path / "kept"
    comparison(methods=["olica"], sparsities=[0.3], config=file, propagation=2, keep=keep)
    config = (keep / "olica-30" / "distprune_config.yaml").read_text()
    assert "align: 16\n" in config
    assert "propagation: 2\n" in config


# ------------------------------------------------------------------ refused before any work


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["olica", "magic"]}, "^magic at 20%: method 'magic' does not exist"),
        ({"methods": []}, "^--methods, --sparsity: give at least one of each"),
        ({"methods": ["olica", "olica"]}, "^--methods, --sparsity: olica at 20% is asked for twice"),
        ({"sparsities": [0.2, 0.85]}, "^olica at 85%: sparsity 0.85 can't be reached"),
        ({"sparsities": [0.2, 1.2]}, "^option 'sparsity' is 1.2"),
        ({"options": {"oops": {"selection": "best"}}}, "^oops at 20%: option 'selection' of method oops"),
        ({"options": {"flap": {"metric": "x"}}}, "^--option flap.metric: 'flap' is not among --methods"),
        ({"text": "none.txt"}, "^none.txt: no such file"),
        ({"evaluation_length": 65}, "^--evaluation-length 65: .* takes windows of 2 to 64 tokens"),
        ({"evaluation_length": 1}, "^--evaluation-length 1: "),
        ({"max_tokens": 15}, "^--max-tokens 15: is less than one window of 16 tokens"),
        ({"calibration": "none.arrow"}, "^none.arrow: no such calibration set"),
        ({"calibration": None, "sequence_length": 65}, "^--sequence-length 65: .* at most 64 tokens"),
        ({"sparsity": 0.2}, r"^a comparison: 'sparsity' can't be common .* give --sparsity\."),
        ({"threads_per_worker": 1000}, "^no worker fits on any node"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_said_before_any_work(comparison, calls, scratch, changes, message):
    rows = []
    with pytest.raises(InputError, match=message):
        comparison(**changes, on_row=rows.append)
    assert (calls, rows, os.listdir(scratch)) == ([], [], [])


def test_a_text_shorter_than_a_window_is_refused(comparison, tmp_path, calls):
    text = tmp_path / "short.txt"
    text.write_text("The sea.")
    with pytest.raises(InputError, match=r"short\.txt: has \d+ tokens, fewer than one window of 16"):
        comparison(text=text)
    assert calls == []


def test_results_that_do_not_fit_side_by_side_are_refused(comparison, dense_path, tmp_path, monkeypatch, calls):
    size = (dense_path / "model.safetensors").stat().st_size
    usage = type("usage", (), {"free": 3 * size})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(InputError, match=r"kept needs .* free"):
        comparison(keep=tmp_path / "kept")
    assert calls == []
    assert len(comparison(methods=["oops"], keep=tmp_path / "kept")) == 3


@pytest.mark.parametrize("line", ["method: oops", "sparsity: 0.3", "output: there", "options: {k: 2}"])
def test_what_differs_between_runs_is_refused_in_the_yaml_file(comparison, tmp_path, calls, line):
    file = tmp_path / "common.yaml"
    file.write_text(f"align: 16\n{line}\n")
    name = line.partition(":")[0]
    with pytest.raises(InputError, match=rf"common\.yaml: '{name}' can't be common to all runs; leave it out and give"):
        comparison(config=file)
    assert calls == []


def test_a_calibration_set_is_not_overwritten_unasked(comparison, tmp_path, calls):
    keep = tmp_path / "kept"
    keep.mkdir()
    (keep / "calibration.arrow").write_text("precious")
    with pytest.raises(InputError, match=r"calibration\.arrow exists"):
        comparison(keep=keep, calibration=None, sequence_length=12)
    assert (keep / "calibration.arrow").read_text() == "precious"
    assert calls == []


# ------------------------------------------------------------------ evaluation in a process of its own


def test_an_evaluation_apart_finds_what_distprune_evaluate_finds(pruned, text_path):
    config = PruneConfig(model="m", output="o", micro_batch=3, dtype="float32")
    perplexity = evaluate_apart(pruned[0], Evaluation(text_path, max_tokens=100, length=16), config)
    expected = evaluate_perplexity(pruned[0], text_path, 16, max_tokens=100, batch_size=3).perplexity
    assert perplexity == pytest.approx(expected, rel=1e-5)


def test_what_an_evaluation_apart_refuses_is_bad_input_here(dense_path):
    config = PruneConfig(model="m", output="o")
    with pytest.raises(InputError, match=r"^/none\.txt: no such file"):
        evaluate_apart(dense_path, Evaluation(Path("/none.txt")), config)


def test_an_evaluation_apart_that_dies_leaves_its_last_words(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'out of luck' >&2\nexit 9\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    config = PruneConfig(model="m", output="o")
    with pytest.raises(RuntimeError, match=r"(?s)ended with status 9:.*out of luck"):
        evaluate_apart(tmp_path, Evaluation(tmp_path), config)


# ------------------------------------------------------------------ the command line


@pytest.fixture
def command(comparison, dense_path, calibration_path, text_path) -> Callable[..., Result]:
    def run(*arguments) -> Result:
        fixed = ["--text", text_path, "--evaluation-length", 16, "--calibration", calibration_path]
        fixed += ["--device", "cpu", "--workers", 1]
        line = ["compare", dense_path, *fixed, *arguments]
        return CliRunner().invoke(app, [str(argument) for argument in line], prog_name="distprune")

    return run


@pytest.fixture
def fail_at(monkeypatch) -> Callable[[float, Exception], None]:
    """Runs at a sparsity raise."""
    prune = comparison_driver.prune

    def fail(sparsity: float, error: BaseException) -> None:
        def prune_or_fail(config, progress, **more):
            if config.sparsity == sparsity:
                raise error
            return prune(config, progress, **more)

        monkeypatch.setattr(comparison_driver, "prune", prune_or_fail)

    return fail


def test_the_table_of_a_large_model_on_gpus_loses_no_digit_in_a_narrow_terminal():
    peak = PeakMemory(10 * GIB, 70 * GIB)
    rows = [
        ComparisonRow("dense", 0.0, 0.0, 68_453_706_496, 70_553_706_496, 3.125),
        ComparisonRow("wanda-sp", 0.125, 0.12494, 59_896_993_184, 61_996_993_184, 1234.5, 86400.04, peak),
    ]
    console = Console(file=io.StringIO(), width=40, soft_wrap=True)
    console.print(comparison_table(rows))
    printed = [line.split() for line in console.file.getvalue().splitlines() if "%" in line]
    assert printed == [
        ["dense", "0%", "0.00%", "68,453,706,496", "70,553,706,496", "3.12", "-", "-", "-"],
        ["wanda-sp", "12.5%", "12.49%", "59,896,993,184", "61,996,993,184", "1234.50", "86400.0", "10.00", "70.00"],
    ]


def first_words(table: str) -> list[str]:
    return [line.split()[0] for line in table.splitlines() if "%" in line]


def test_the_table_has_a_row_a_model_and_fits_a_terminal(command):
    result = command("--methods", "oops,olica", "--sparsity", "0.2,0.3")
    assert result.exit_code == 0, result.output
    assert first_words(result.stdout) == ["dense", "oops", "oops", "olica", "olica"]
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["decoder", "all", "peak"]
    headings = ["method", "asked", "reached", "parameters", "parameters", "perplexity", "seconds", "GiB"]
    assert lines[2].split() == headings
    assert [line.split()[1] for line in lines[4:9]] == ["0%", "20%", "30%", "20%", "30%"]
    assert {len(line.split()) for line in lines[4:9]} == {len(headings)}
    assert "olica at 30% (4 of 4)" in result.stderr.splitlines()
    assert "\x1b" not in result.stderr


def test_json_is_all_that_stands_on_stdout_when_asked_for(command):
    result = command("--methods", "oops", "--sparsity", "0.2", "--json", "--option", "oops.selection=score")
    assert result.exit_code == 0, result.output
    dense, row = json.loads(result.stdout)
    assert (dense["method"], row["method"], row["sparsity_asked"]) == ("dense", "oops", 0.2)
    assert row["peak_memory"]["resident"] > 0
    assert row["perplexity"] != dense["perplexity"]


@pytest.mark.parametrize(
    ("error", "code", "last_words"),
    [
        (InputError("tensor t is bad"), 2, "distprune: oops at 30%: tensor t is bad"),
        (ArithmeticError("NaN"), 1, "oops at 30% failed"),
        (KeyboardInterrupt(), 130, ""),
    ],
    ids=["input", "failure", "interrupt"],
)
@pytest.mark.parametrize("form", [[], ["--json"]], ids=["table", "json"])
def test_a_failing_run_leaves_the_rows_before_it(command, fail_at, scratch, error, code, last_words, form):
    fail_at(0.3, error)
    result = command("--methods", "oops", "--sparsity", "0.2,0.3", *form)
    assert result.exit_code == code
    rows = [row["method"] for row in json.loads(result.stdout)] if form else first_words(result.stdout)
    assert rows == ["dense", "oops"]
    assert last_words in (result.stderr if code == 2 else str(result.exception))
    assert os.listdir(scratch) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0.2,some"], "--sparsity: 'some' is not a number; write them as in 0.2,0.3."),
        (["--option", "selection=score"], "--option selection=score: write METHOD.NAME=VALUE."),
        (["--option", "oops.selection"], "--option oops.selection: write METHOD.NAME=VALUE."),
        (["--option", "oops=0.5"], "--option oops=0.5: write METHOD.NAME=VALUE."),
        (["--methods", "oops,magic"], "magic at 20%: method 'magic' does not exist."),
    ],
)
def test_an_unusable_command_line_is_refused_in_one_line(command, arguments, message):
    result = command("--methods", "oops", "--sparsity", "0.2", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"distprune: {message}")
    assert len(result.stderr.splitlines()) == 1


def test_options_reach_the_comparison_under_their_names(command, monkeypatch):
    seen = {}
    monkeypatch.setattr(api, "compare", lambda **given: seen.update(given))
    options = ["--option", "wanda-sp.a=2", "--option", "wanda-sp.b=x.y=z", "--option", "oops.radius=.inf"]
    result = command("--methods", "oops,wanda-sp", "--sparsity", "0.2,.5", "--max-tokens", 90, "--align", 4, *options)
    assert result.exit_code == 0, result.output
    assert (seen["methods"], seen["sparsities"]) == (["oops", "wanda-sp"], [0.2, 0.5])
    assert seen["options"] == {"wanda-sp": {"a": 2, "b": "x.y=z"}, "oops": {"radius": float("inf")}}
    assert (seen["max_tokens"], seen["evaluation_length"], seen["align"]) == (90, 16, 4)
    assert (seen["overwrite"], seen["keep"], seen["trust_remote_code"]) == (None, None, None)


def test_the_suffix_distils_one_run_and_no_other(comparison, tmp_path):
    options = {
        "methods": ["oops", "oops+distill"],
        "sparsities": [0.3],
        "distill": {"epochs": 2, "learning_rate": 1e-3},
    }
    rows = comparison(keep=tmp_path / "kept", **options)
    assert [row.method for row in rows] == ["dense", "oops", "oops+distill"]
    assert rows[1].perplexity != rows[2].perplexity
    plain, distilled = (inspect(tmp_path / "kept" / f"{name}-30") for name in ("oops", "oops+distill"))
    assert {layer.distillation for layer in plain.layers} == {None}
    assert all(len(layer.distillation.training) == 2 for layer in distilled.layers)
