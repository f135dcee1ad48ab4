"""The gradient pass of whole runs: the same bytes by any workers and after interruptions, and what it leaves behind."""

from __future__ import annotations

import pytest
import torch
from by_gradient import ByGradient
from gradients import by_transformers
from interruptions import Stops
from transformers import AutoModelForCausalLM

from distprune import status
from distprune.calibration import open_calibration
from distprune.checkpoint import partial_directory
from distprune.engine import load_record
from distprune.engine.run.journal import Journal, entry_of
from distprune.engine.run.states import DENSE, GRADIENT
from distprune.engine.run.status import stages_of
from distprune.engine.stages.dense_pass import PASSED, PROFILE
from distprune.methods import METHODS

OPTIONS = {"method": "llm-pruner", "sparsity": 0.3, "propagation": 2, "max_shard_size": 60_000}
LAYERS = 4


@pytest.fixture(scope="module")
def by_one_worker(run, digests) -> dict[str, str]:
    return digests(run(**OPTIONS)[0])


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_workers_gives_the_same_bytes(by_one_worker, run, calls, digests, workers):
    folder, record = run(workers=workers, **OPTIONS)
    assert digests(folder) == by_one_worker
    assert len({worker for method, worker in calls if method == "backward"}) == workers
    assert {"dense pass", "gradient pass", "prune"} < set(record.seconds)


@pytest.mark.parametrize(
    ("stage", "steps", "repeated"),
    [
        ("Dense pass", 2, {"open_forward": 2, "open_loss": 1, "open_backward": 4}),
        ("Gradient pass", 0, {"open_forward": 0, "open_loss": 1, "open_backward": 4}),
        ("Gradient pass", 1, {"open_forward": 0, "open_loss": 0, "open_backward": 3}),
        ("Gradient pass", 3, {"open_forward": 0, "open_loss": 0, "open_backward": 1}),
        ("Pruning", 0, {"open_forward": 0, "open_loss": 0, "open_backward": 0}),
    ],
)
def test_nothing_that_is_done_is_done_again(by_one_worker, run, calls, digests, tmp_path, stage, steps, repeated):
    output = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops(stage, steps), **OPTIONS)
    calls.clear()
    assert digests(run(output=output, workers=2, **OPTIONS)[0]) == by_one_worker
    kinds = [kind for kind, _ in calls]
    assert {name: kinds.count(name) for name in repeated} == repeated


def test_curvature_goes_on_to_the_same_bytes(prune_here, digests, tmp_path):
    options = {"method": "curvature", "distill": None}
    prune_here(tmp_path / "undisturbed", **options)
    for stage, steps in (("Gradient pass", 2), ("Pruning", 0), ("Pruning", 2)):
        output = tmp_path / f"{stage}-{steps}"
        with pytest.raises(KeyboardInterrupt):
            prune_here(output, progress=Stops(stage, steps), **options)
        assert not output.exists()
        prune_here(output, **options)
        assert digests(output) == digests(tmp_path / "undisturbed"), (stage, steps)


def test_a_method_with_gradient_moments_alone_and_a_plan_by_its_profiles_runs(prune_here, tmp_path, monkeypatch):
    monkeypatch.setitem(METHODS, "by-gradient", ByGradient)
    record = prune_here(tmp_path / "pruned", method="by-gradient", distill=None)
    assert record.decoder_sparsity == pytest.approx(0.3, abs=0.03)


def test_a_run_tells_what_its_plan_is_predicted_to_cost(prune_here, tmp_path):
    told = Stops("never", 0)
    record = prune_here(tmp_path / "pruned", method="curvature", distill=None, progress=told)
    assert record.predicted_loss > 0
    assert 0 <= record.gap < 1
    assert f"{record.predicted_loss:.4g} nats a token" in "".join(told.notes)
    assert load_record(tmp_path / "pruned") == record


def test_the_profiles_are_made_of_the_whole_models_gradients(run, dense_path, calibration_path, tmp_path):
    output = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Pruning", 0), workers=2, **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(dense_path)
    gradients = by_transformers(model, torch.from_numpy(open_calibration(calibration_path).tokens.astype("int64")))
    journal = Journal(partial_directory(output) / "journal")
    for index, layer in enumerate(model.model.layers):
        worth = {name: layer.get_submodule(name).weight * weight for name, weight in gradients.weights[index].items()}
        neurons = sum(worth[f"mlp.{name}_proj"].abs().sum(dim=1) for name in ("gate", "up"))
        neurons = neurons + worth["mlp.down_proj"].abs().sum(dim=0)
        profile = journal.tensors(entry_of(PROFILE, index))
        torch.testing.assert_close(profile["neurons"], neurons.detach(), rtol=1e-3, atol=1e-5)


def test_the_journal_keeps_what_is_still_needed_and_no_more(run, tmp_path):
    def kept(kind: str) -> list[int]:
        return [index for index in range(LAYERS + 1) if journal.has(entry_of(kind, index))]

    output = tmp_path / "pruned"
    journal = Journal(partial_directory(output) / "journal")
    stages = (("Gradient pass", 0), ("Gradient pass", 2), ("Pruning", 0))
    for (stage, steps), dense, gradients in zip(
        stages, ([0, 1, 2, 3, 4], [0, 1, 2], [0, 2]), ([], [1], []), strict=True
    ):
        with pytest.raises(KeyboardInterrupt):
            run(output=output, progress=Stops(stage, steps), **OPTIONS)
        assert (kept(DENSE), kept(GRADIENT)) == (dense, gradients), stage
        assert kept(PASSED) == [0, 1, 2, 3]


def test_the_dense_models_perplexity_is_told(run, dense_path, calibration_path):
    listening = Stops("never", 0)
    run(progress=listening, **OPTIONS)
    model = AutoModelForCausalLM.from_pretrained(dense_path)
    tokens = torch.from_numpy(open_calibration(calibration_path).tokens.astype("int64"))
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.exp().item()
    [told] = [text for text in listening.notes if "perplexity" in text]
    assert float(told.split()[-1]) == pytest.approx(expected, rel=1e-3)


def test_the_status_counts_its_layers(run, tmp_path):
    output = tmp_path / "pruned"
    with pytest.raises(KeyboardInterrupt):
        run(output=output, progress=Stops("Gradient pass", 2), **OPTIONS)
    stopped = status(output)
    assert stopped.layers_done == {"dense pass": 4, "gradient pass": 2, "prune": 0}
    run(output=output, **OPTIONS)
    finished = status(output)
    assert finished.layers_done == {"dense pass": 4, "gradient pass": 4, "prune": 4}
    assert list(stages_of(finished.run)) == ["dense pass", "gradient pass", "prune"]
