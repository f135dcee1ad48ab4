"""Evaluations that are attached to a report are shown as they were measured."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from html_pages import read_page

from distprune import InputError, report
from distprune.evaluation import BatchSpeed, ModelEvaluation, PerplexityResult, Speed


def evaluation(model: str, perplexity: float, accuracy: float, ratio: float) -> ModelEvaluation:
    batches = tuple(BatchSpeed(batch, 900.0 * ratio, 30.0 * ratio, ratio, ratio) for batch in (1, 16))
    return ModelEvaluation(
        model,
        PerplexityResult(perplexity, 1.0, 127, 1, 128, 0.5, "float32"),
        {"hellaswag": {"acc": accuracy - 0.1, "acc_norm": accuracy, "acc_norm_stderr": 0.01}},
        Speed(batches, 1024.0, 2**20, 2**24, "float32"),
    )


@pytest.fixture
def results(tmp_path):
    """What `distprune evaluate --json` prints, in a file."""
    file = tmp_path / "results.json"
    both = [evaluation("big", 10.0, 0.5, 1.0), evaluation("small", 12.5, 0.4, 1.25)]
    file.write_text(json.dumps([asdict(one) for one in both]))
    return file


@pytest.fixture
def page(results, pruned, tmp_path):
    return read_page(report(pruned[0], evaluation=results, output=tmp_path / "report.html"))


def test_perplexity_tasks_and_speed_are_those_that_were_measured(page):
    assert page.values["perplexity"] == 12.5
    assert page.trace("tasks", "small")["y"] == [0.4]
    assert page.trace("tasks", "small")["error_y"]["array"] == [0.01]
    assert page.trace("speed", "small")["y"] == [1.25] * 4
    assert ["perplexity", "10.00 (1.00)", "12.50 (1.25)"] in page.rows
    assert ["small", "1,125 (1.25)", "38 (1.25)"] in page.rows


def test_one_model_alone_is_compared_with_none(results, pruned, tmp_path):
    results.write_text(json.dumps(json.loads(results.read_text())[:1]))
    page = read_page(report(pruned[0], evaluation=results, output=tmp_path / "report.html"))
    assert "perplexity" not in page.values
    assert ["perplexity", "10.00"] in page.rows


@pytest.mark.parametrize(
    ("content", "reason"),
    [(None, "can't be read"), ("{", "Invalid JSON"), ("[]", "holds no model"), ('[{"model": "m"}]', "perplexity: ")],
)
def test_a_file_that_holds_no_evaluation_is_refused(pruned, tmp_path, content, reason):
    file, before = tmp_path / "results.json", (pruned[0] / "report.html").read_bytes()
    if content is not None:
        file.write_text(content)
    with pytest.raises(InputError, match=rf"--evaluation .*results\.json: .*{reason}.*evaluate DENSE PRUNED --json"):
        report(pruned[0], evaluation=file)
    assert (pruned[0] / "report.html").read_bytes() == before
