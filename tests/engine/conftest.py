"""Runs in this process, and workers that die when they are told to."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_mixtures import MIXTURES
from without_ray import do_without_ray

from distprune import prune
from distprune.engine import RunRecord
from distprune.engine.scheduler import pool

#: What the tests' tokenizer says of a model.
OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
OPTIONS = {
    "method": "olica",
    "sparsity": 0.3,
    "max_shard_size": 160_000,
    "propagation": 2,
    "distill": {"learning_rate": 1e-3, "batch": 2},
}


@pytest.fixture(scope="session")
def llama(save_model) -> Path:
    """A Llama of three layers, which tests leave as it is."""
    return save_model(num_hidden_layers=3)


@pytest.fixture(scope="session")
def prune_llama(llama, calibrate) -> Callable[..., RunRecord]:
    """Prunes the Llama, or another model, into a folder, with every stage there is."""

    def prune_one(output: Path, model: Path = llama, **changes) -> RunRecord:
        options = {"device": "cpu", "workers": 1, "micro_batch": 3, **OPTIONS} | changes
        if "calibration" not in options:
            options["calibration"] = calibrate(model)
        return prune(str(model), output, **options)

    return prune_one


@pytest.fixture
def prune_here(prune_llama, monkeypatch) -> Callable[..., RunRecord]:
    """The same in this process."""
    do_without_ray(monkeypatch)
    return prune_llama


@pytest.fixture(scope="session")
def undisturbed_here(prune_llama, digests, tmp_path_factory) -> dict[str, str]:
    """The digests of what `prune_here` makes, whoever writes the parts."""
    output = tmp_path_factory.mktemp("undisturbed") / "pruned"
    with pytest.MonkeyPatch.context() as patch:
        do_without_ray(patch)
        prune_llama(output)
    return digests(output)


@pytest.fixture(scope="session")
def save_mixture(save_model) -> Callable[..., Path]:
    """Saves a small random mixture of experts, with the tests' tokenizer, and gives its folder."""

    def save(model_type: str, **changes) -> Path:
        sizes = {name: value for name, value in MIXTURES[model_type].items() if name not in OF_THE_TOKENIZER}
        return save_model(model_type, **sizes | changes)

    return save


@pytest.fixture
def lose(new_workers, calls, monkeypatch):
    """Lets the worker that is given one of the chosen calls die before it gets to it. Gives the calls."""
    lost = []

    def choose(is_chosen) -> list[pool.Call]:
        prefetch = pool.WorkerPool._prefetch

        def kill_and_prefetch(self, attempt):
            if is_chosen(attempt):
                attempt.worker.__ray_call__.remote(lambda _: os.kill(os.getpid(), signal.SIGKILL))
                lost.append(attempt.call)
            return prefetch(self, attempt)

        monkeypatch.setattr(pool.WorkerPool, "_prefetch", kill_and_prefetch)
        return lost

    return choose
