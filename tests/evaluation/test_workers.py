"""One model's evaluation spread over Ray workers: the same bits, whoever scores which batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from distprune import api
from distprune.engine import evaluators
from distprune.engine.scheduler import pool
from distprune.errors import InputError
from distprune.evaluation import ModelEvaluation

TASKS = ("tiny_choice", "tiny_generation", "tiny_rolling")
HERE = {"batch_size": 3, "device": "cpu", "dtype": "float32", "sequence_length": 16}

pytestmark = pytest.mark.usefixtures("new_workers")


@pytest.fixture(scope="module")
def evaluate(pruned, text_path, task_folder) -> Callable[..., ModelEvaluation]:
    """Evaluates the pruned Llama on text and tasks; seconds left out."""

    def run(**options) -> ModelEvaluation:
        given = {"tasks": TASKS, "include_path": task_folder, **HERE, **options}
        [found] = api.evaluate(str(pruned[0]), text_path, **given)
        return replace(found, perplexity=replace(found.perplexity, seconds=0.0))

    return run


@pytest.fixture(scope="module")
def here(only_our_tasks, evaluate) -> ModelEvaluation:
    """The same without workers."""
    return evaluate()


@pytest.fixture
def told(monkeypatch) -> list[tuple[object, str]]:
    """Worker and question of each batch; the first waits until two workers are up."""
    told = []
    prefetch, are_up = pool.WorkerPool._prefetch, pool.WorkerPool.are_up

    def note(self, attempt):
        told.append((attempt.worker, attempt.task.kind()))
        return prefetch(self, attempt)

    monkeypatch.setattr(pool.WorkerPool, "_prefetch", note)
    monkeypatch.setattr(pool.WorkerPool, "are_up", lambda self, count, patience: are_up(self, len(self.workers), None))
    return told


@pytest.mark.slow
def test_one_worker_and_two_find_what_is_found_here(here, evaluate, told):
    assert evaluate(workers=1) == here
    assert len({worker for worker, _ in told}) == 1
    told.clear()
    assert evaluate(workers=2) == here
    assert {question for _, question in told} == {"dtype", "loss", "log_likelihoods", "generations"}
    for question in ("loss", "log_likelihoods", "generations"):
        assert len({worker for worker, asked in told if asked == question}) == 2


@pytest.mark.parametrize(
    "question",
    [
        "log_likelihoods",
        pytest.param("loss", marks=pytest.mark.slow),
        pytest.param("generations", marks=pytest.mark.slow),
    ],
)
def test_a_lost_worker_changes_nothing(here, evaluate, told, monkeypatch, question):
    prefetch, killed = pool.WorkerPool._prefetch, []

    def kill_and_prefetch(self, attempt):
        if attempt.task.kind() == question and not killed:
            killed.append(attempt.worker)
            attempt.worker.__ray_call__.remote(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return prefetch(self, attempt)

    monkeypatch.setattr(pool.WorkerPool, "_prefetch", kill_and_prefetch)
    assert evaluate(workers=2) == here
    assert len(killed) == 1
    others = sum(asked == question for worker, asked in told if worker != killed[0])
    assert others >= 1


def test_a_batch_that_kills_every_worker_is_an_error_with_a_fix(pruned, text_path, monkeypatch):
    prefetch = pool.WorkerPool._prefetch

    def kill_and_prefetch(self, attempt):
        if attempt.task.kind() == "loss" and attempt.call.order == 1:
            attempt.worker.__ray_call__.remote(lambda _: os.kill(os.getpid(), signal.SIGKILL))
        return prefetch(self, attempt)

    monkeypatch.setattr(pool.WorkerPool, "_prefetch", kill_and_prefetch)
    monkeypatch.setattr(pool, "LOSSES", 1)
    with pytest.raises(evaluators.WorkersLost, match=r"'loss' .* Take fewer --workers or a smaller --batch-size"):
        api.evaluate(str(pruned[0]), text_path, workers=1, **HERE)


def test_a_folder_that_a_node_does_not_see_is_refused_there(pruned, text_path, tmp_path, monkeypatch):
    elsewhere = replace(evaluators.Whereabouts.of(pruned[0]), path=str(tmp_path / "unseen"))
    monkeypatch.setattr(evaluators.Whereabouts, "of", lambda _: elsewhere)
    with pytest.raises(InputError, match=r"^node \S+: .*unseen can't be read .* Let every node see"):
        api.evaluate(str(pruned[0]), text_path, workers=1, **HERE)


def test_a_snapshot_in_the_hubs_cache_is_fetched_where_it_is_not_seen():
    folder = Path("/cache/hub/models--owner--some--model/snapshots/0123abc")
    assert evaluators.cached_from(folder) == {"repository": "owner/some--model", "commit": "0123abc"}
    assert evaluators.cached_from(Path("/models/pruned")) is None
