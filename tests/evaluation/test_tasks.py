"""Lm-eval's tasks, beside what lm-eval's own command line finds on the same folder."""

from __future__ import annotations

import sys

import pytest
from lm_eval_alone import lm_eval_alone

from distprune import api
from distprune.errors import InputError
from distprune.evaluation import ModelEvaluation
from distprune.evaluation.scorer import Scorer

TASKS = ("tiny_choice", "tiny_generation", "tiny_rolling")
BATCH = 3
HERE = {"batch_size": BATCH, "device": "cpu", "dtype": "float32", "sequence_length": 16}


@pytest.fixture(scope="module")
def evaluated(only_our_tasks, dense_path, pruned, task_folder) -> list[ModelEvaluation]:
    """The dense and the pruned Llama side by side, in this process."""
    return api.evaluate([str(dense_path), str(pruned[0])], tasks=TASKS, include_path=task_folder, **HERE)


@pytest.mark.parametrize("which", [0, 1], ids=["dense", "pruned"])
def test_scores_are_those_of_lm_evals_own_command_line(evaluated, dense_path, pruned, task_folder, tmp_path, which):
    folder = [dense_path, pruned[0]][which]
    alone = lm_eval_alone(folder, TASKS, task_folder, tmp_path / "output", BATCH)
    assert evaluated[which].tasks == alone


def test_models_stand_side_by_side_with_lm_evals_names(evaluated, dense_path, pruned):
    assert [evaluation.model for evaluation in evaluated] == [str(dense_path), str(pruned[0])]
    dense, other = (evaluation.tasks for evaluation in evaluated)
    assert dense.keys() == other.keys() == set(TASKS)
    assert {"acc", "acc_norm", "acc_stderr"} <= dense["tiny_choice"].keys()
    assert {"exact_match,as-is", "exact_match,first-letter"} <= dense["tiny_generation"].keys()
    assert "word_perplexity" in dense["tiny_rolling"]
    assert dense["tiny_rolling"] != other["tiny_rolling"]


@pytest.mark.slow
def test_examples_and_limits_reach_the_tasks(dense_path, task_folder, tmp_path):
    options = {"num_fewshot": 1, "limit": 4}
    [found] = api.evaluate(str(dense_path), tasks=["tiny_*"], include_path=task_folder, **options, **HERE)
    given = ("--num_fewshot", 1, "--limit", 4)
    assert found.tasks == lm_eval_alone(dense_path, TASKS, task_folder, tmp_path / "output", BATCH, *given)


# ------------------------------------------------------------------ what is refused


@pytest.fixture
def no_weights(monkeypatch):
    """Reading weights is an error."""
    monkeypatch.setattr(Scorer, "model", property(lambda _: pytest.fail("weights are read")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"tasks": ["tiny_chioce"]},
            r"--tasks tiny_chioce: lm-eval has no such task\. Did you mean .*--include",
        ),
        ({"tasks": ["tiny_choice"], "include_path": "nowhere"}, r"--include-path nowhere: is no folder"),
        ({"tasks": ["tiny_choice"], "limit": 0}, r"--limit 0: give a number"),
        ({"tasks": ["tiny_choice"], "num_fewshot": -1}, r"--num-fewshot -1: at least 0"),
        ({"limit": 3, "text": "text.txt"}, r"--include-path .*: belongs to --tasks"),
        ({"include_path": None}, r"nothing to evaluate; give --text, --tasks or --speed"),
        ({"tasks": ["tiny_choice"], "address": "127.0.0.1:1"}, r"--address 127\.0\.0\.1:1: belongs to --workers"),
        ({"tasks": ["tiny_choice"], "field": "body"}, r"--field body: belongs to --text"),
        ({"tasks": ["tiny_choice"], "workers": 0}, r"option 'workers' is 0"),
    ],
)
def test_unusable_options_are_refused_before_weights_are_read(
    dense_path, task_folder, text_path, monkeypatch, no_weights, options, message
):
    monkeypatch.chdir(text_path.parent)
    with pytest.raises(InputError, match=message):
        api.evaluate(str(dense_path), **{"include_path": task_folder, **HERE, **options})


def test_a_task_whose_data_are_missing_is_named(dense_path, task_folder, tmp_path, no_weights):
    task = (task_folder / "choice.yaml").read_text().replace(str(task_folder), "/nowhere")
    (tmp_path / "broken.yaml").write_text(task)
    with pytest.raises(InputError, match=r"--tasks tiny_choice: lm-eval can't load it \(.*/nowhere/choice\.jsonl"):
        api.evaluate(str(dense_path), tasks=["tiny_choice"], include_path=tmp_path, **HERE)


def test_a_task_that_runs_what_models_write_is_refused(dense_path, task_folder, tmp_path, no_weights):
    (tmp_path / "code.yaml").write_text((task_folder / "generation.yaml").read_text() + "unsafe_code: true\n")
    with pytest.raises(InputError, match=r"--tasks tiny_generation: runs code that models write"):
        api.evaluate(str(dense_path), tasks=["tiny_generation"], include_path=tmp_path, **HERE)


def test_without_lm_eval_the_message_says_what_to_install(dense_path, monkeypatch, no_weights):
    monkeypatch.delitem(sys.modules, "distprune.evaluation.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"--tasks tiny_choice: needs the package lm-eval.*distprune\[eval\]"):
        api.evaluate(str(dense_path), tasks=["tiny_choice"])


def test_a_model_without_room_for_what_a_task_generates_is_refused(dense_path, task_folder, tmp_path):
    task = (task_folder / "generation.yaml").read_text().replace("max_gen_toks: 6", "max_gen_toks: 64")
    (tmp_path / "long.yaml").write_text(task)
    with pytest.raises(InputError, match=r"requested max tokens to generate \(64\).*Set max_gen_toks"):
        api.evaluate(str(dense_path), tasks=["tiny_generation"], include_path=tmp_path, **HERE)
