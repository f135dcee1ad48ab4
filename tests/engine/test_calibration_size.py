"""A plan from fewer tokens than a hidden state has numbers is made all the same, and the run says what it is worth."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import AutoConfig

from distprune.calibration import open_calibration, write_calibration
from distprune.engine.run.calibration_size import too_few_tokens
from distprune.methods import Plan

PREDICTING, SILENT = Plan([], predicted_loss=0.0, gap=0.0), Plan([])


@pytest.mark.parametrize(("plan", "tokens", "notes"), [(PREDICTING, 63, 1), (PREDICTING, 64, 0), (SILENT, 63, 0)])
def test_a_plan_that_predicts_the_loss_needs_as_many_tokens_as_the_hidden_size(plan, tokens, notes):
    assert len(too_few_tokens(plan, tokens, 64)) == notes


@pytest.mark.parametrize("method", ["curvature", "magnitude"])
def test_too_small_a_calibration_set_is_told_of_in_the_record_and_the_report(
    prune_here, llama, calibrate, tmp_path, method
):
    whole = open_calibration(calibrate(llama))
    tokens = whole.tokens[:2, :8].copy()
    write_calibration(tmp_path / "small.arrow", tokens, replace(whole.metadata, sequence_length=8))
    output = tmp_path / "pruned"
    record = prune_here(output, method=method, options={}, calibration=tmp_path / "small.arrow", distill=False)
    needed = AutoConfig.from_pretrained(llama).hidden_size
    if method == "magnitude":
        assert record.notes == []
        return
    [note] = record.notes
    assert f"has 16 tokens, and the model's hidden size is {needed}:" in note
    assert f"at least {needed} tokens" in note and "--samples" in note
    assert "the calibration set has 16 tokens" in (output / "report.html").read_text().lower()


def test_a_set_that_is_large_enough_is_not_told_of(prune_here, tmp_path):
    assert prune_here(tmp_path / "pruned", method="curvature", options={}, distill=False).notes == []
