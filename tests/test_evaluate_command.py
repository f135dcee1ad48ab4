"""`distprune evaluate`: tables for people and JSON for programs."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from typer.testing import CliRunner, Result

from distprune import api
from distprune.cli import app
from distprune.evaluation import BatchSpeed, ModelEvaluation, PerplexityResult, Speed, SpeedOptions

PERPLEXITY = PerplexityResult(20.0, 3.0, 300, 20, 16, 1.5, "float32")


@pytest.fixture
def evaluate():
    """Runs the command in this process."""

    def run(*arguments) -> Result:
        return CliRunner().invoke(app, ["evaluate", *map(str, arguments)], prog_name="distprune")

    return run


@pytest.fixture
def found(monkeypatch) -> tuple[list[ModelEvaluation], list[tuple]]:
    """What an evaluation of two models comes to, and what it was asked."""

    def speed(factor: float) -> Speed:
        batches = tuple(BatchSpeed(batch, 1000 * factor, 100 * factor, factor, factor) for batch in (1, 16))
        return Speed(batches, 512 / factor, int(2**30 / factor), 2**31, "float32")

    evaluations = [
        ModelEvaluation("dense", PERPLEXITY, {"quiz": {"acc": 0.5, "acc_stderr": 0.01, "f1,strict": 0.25}}, speed(1)),
        ModelEvaluation(
            "pruned", PERPLEXITY, {"quiz": {"acc": 0.4, "acc_stderr": 0.02, "f1,strict": 0.30}}, speed(1.25)
        ),
    ]
    asked = []

    def answer(*arguments, **options) -> list[ModelEvaluation]:
        asked.append((arguments, options))
        return evaluations

    monkeypatch.setattr(api, "evaluate", answer)
    return evaluations, asked


def test_options_reach_the_evaluation_under_their_names(evaluate, found):
    _, asked = found
    line = "a b --text t.jsonl --field body --tasks x,y --include-path p --num-fewshot 2 --limit 0.5 --max-tokens 9"
    line += " --sequence-length 8 --batch-size 3 --device cpu --dtype float32 --workers 2 --threads-per-worker 4"
    line += " --address ray://h:1 --revision main --trust-remote-code --speed --speed-batches 1,4 --speed-threads 2"
    assert evaluate(*line.split()).exit_code == 0
    [(_, options)] = asked
    assert options.pop("include_path").name == "p"
    assert options == {
        "models": ["a", "b"],
        "text": "t.jsonl",
        "field": "body",
        "tasks": ["x", "y"],
        "num_fewshot": 2,
        "limit": 0.5,
        "max_tokens": 9,
        "sequence_length": 8,
        "batch_size": 3,
        "device": "cpu",
        "dtype": "float32",
        "workers": "2",
        "threads_per_worker": 4,
        "gpus_per_worker": None,
        "address": "ray://h:1",
        "revision": "main",
        "trust_remote_code": True,
        "speed": SpeedOptions(batches=(1, 4), threads=2),
    }


def test_tables_have_the_others_against_the_first(evaluate, found):
    output = evaluate("dense", "pruned", "--speed").output
    rows = [" ".join(line.split()) for line in output.splitlines()]
    assert "perplexity 20.00 (1.00) 20.00 (1.00)" in rows
    assert "quiz, acc 0.5000 ± 0.0100 0.4000 ± 0.0200 (-0.1000)" in rows
    assert "quiz, f1,strict 0.2500 0.3000 (+0.0500)" in rows
    assert "pruned 819 (0.80) 2,048 (1.00) 410 (0.80)" in rows
    assert rows.count("pruned 1,250 (1.25) 125 (1.25)") == 2
    assert {"batch 1", "batch 16", "memory, in float32"} <= set(rows)
    assert "perplexity on 300 tokens (20 windows of 16, in float32, 1.5 and 1.5 s)" in rows


def test_json_is_a_list_of_one_object_a_model(evaluate, found):
    evaluations, _ = found
    written = json.loads(evaluate("dense", "pruned", "--json").stdout)
    assert written == json.loads(json.dumps([asdict(evaluation) for evaluation in evaluations]))
    assert [set(evaluation) for evaluation in written] == [{"model", "perplexity", "tasks", "speed", "text"}] * 2
    assert written[0]["perplexity"] == asdict(PERPLEXITY)
    assert written[1]["tasks"]["quiz"]["acc"] == 0.4


def test_two_models_are_evaluated_from_the_command_line(evaluate, model_path, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The river runs down to the sea. " * 20)
    options = ["--text", text, "--sequence-length", 16, "--device", "cpu", "--json"]
    first, second = json.loads(evaluate(model_path, model_path, *options).stdout)
    assert first["perplexity"]["perplexity"] == second["perplexity"]["perplexity"] > 1
    assert (first["tasks"], first["speed"]) == ({}, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate; give --text, --tasks or --speed."),
        (["--speed", "--speed-batches", "1,x"], "--speed-batches 1,x: write numbers of sequences, as in 1,16."),
        (["--text", "none.jsonl"], "none.jsonl: no such file."),
        (["--text", "none.jsonl", "--revision", "v1"], "is not on the hub, so it has no revision v1."),
    ],
)
def test_bad_input_is_one_message(evaluate, model_path, options, message):
    result = evaluate(model_path, *options)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert result.output.count("distprune: ") == 1


def test_a_revision_is_that_of_the_models_on_the_hub(model_path, monkeypatch):
    import distprune.checkpoint

    asked = []
    monkeypatch.setattr(distprune.checkpoint, "resolve_model", lambda *a, **b: asked.append((*a, b)) or model_path)
    with pytest.raises(distprune.errors.InputError, match="no such file"):
        api.evaluate(["someone/model", str(model_path)], "none.txt", revision="v1")
    assert asked == [("someone/model", {"revision": "v1"}), (str(model_path), {"revision": None})]
