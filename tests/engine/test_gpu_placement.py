"""Whole runs on a stand-in for a GPU: whatever meets there must have been moved there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from kinds_of_methods import BRIEF, OF_ALL_MODELS
from pretend_gpu import NAME, pretend_gpu

from distprune import load
from distprune.engine.worker import actor
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.layers.runner import LayerRunner
from distprune.methods import METHODS

pytestmark = pytest.mark.alone  # see conftest

CHUNKED = {"sparsity": 0.3, "distill": None, "experts_at_once": 3}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def prune_on_gpu(prune_here, monkeypatch):
    def prune(output: Path, **changes) -> None:
        with pretend_gpu() as gpu, monkeypatch.context() as patched:
            # The rehearsal of the run is no part of it.
            patched.setattr("distprune.planning.worker_needs", lambda *_: (0, 0))
            patched.setattr(
                actor, "LayerWorker", lambda config, model, _, *rest: LayerWorker(config, model, gpu, *rest)
            )
            for name in ("run", "observe"):  # such tensors know no inference mode
                patched.setattr(LayerRunner, name, torch.no_grad()(getattr(LayerRunner, name).__wrapped__))
            prune_here(output, **changes)

    return prune


@pytest.fixture
def solved_on(monkeypatch) -> set[str]:
    """The devices that layers and their statistics are on when they are pruned."""
    devices = set()
    for method in METHODS.values():

        def prune(self, given, original=method.prune):
            statistics = given.statistics
            tensors = [*given.layer.rest.values(), *statistics._totals.values(), *statistics._averages.values()]
            devices.update(tensor.device.type for tensor in tensors)
            return original(self, given)

        monkeypatch.setattr(method, "prune", prune)
    return devices


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return load(folder)(IDS).logits


@pytest.mark.parametrize("method", OF_ALL_MODELS)
def test_every_method_gives_there_what_it_gives_on_the_cpu(prune_here, prune_on_gpu, solved_on, tmp_path, method):
    options = {"method": method, "options": BRIEF.get(method, {})}
    prune_here(tmp_path / "cpu", **options)
    for offload in (False, True):
        solved_on.clear()
        prune_on_gpu(tmp_path / f"gpu-{offload}", offload=offload, **options)
        assert solved_on == {"cpu" if offload else NAME}
        torch.testing.assert_close(logits(tmp_path / f"gpu-{offload}"), logits(tmp_path / "cpu"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("method", "layout"), [("curvature", "free"), ("wanda-sp", "stock"), ("slimgpt", "free")])
def test_experts_in_chunks_give_there_what_they_give_on_the_cpu(
    prune_here, prune_on_gpu, save_mixture, tmp_path, method, layout
):
    options = {"model": save_mixture("qwen3_moe"), "method": method, "layout": layout} | CHUNKED
    prune_here(tmp_path / "cpu", **options)
    prune_on_gpu(tmp_path / "gpu", **options)
    torch.testing.assert_close(logits(tmp_path / "gpu"), logits(tmp_path / "cpu"), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("train", ["lora", "full"])
def test_layers_learn_together_there_as_on_the_cpu(prune_here, prune_on_gpu, tmp_path, train):
    options = {"method": "magnitude", "distill": {"objective": "logits", "train": train, "batch": 4}}
    prune_here(tmp_path / "cpu", **options)
    prune_on_gpu(tmp_path / "gpu", **options)
    torch.testing.assert_close(logits(tmp_path / "gpu"), logits(tmp_path / "cpu"), rtol=1e-3, atol=1e-4)
