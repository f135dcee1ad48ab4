"""What a run leaves behind: its record, its own samples, and nothing at all when it fails."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict

import pytest
import ray
from ray.exceptions import RayTaskError

from distprune import InputError, inspect
from distprune.calibration import open_calibration
from distprune.engine import load_record
from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.telemetry.progress import Progress
from distprune.engine.worker.host_tensor import fetch


def test_the_record_tells_memory_time_and_parameters(pruned):
    _, record = pruned
    assert record.peak_memory_driver.resident > 0
    assert len(record.peak_memory_workers) == 1
    assert all(peak.resident > 0 and peak.device == 0 for peak in record.peak_memory_workers)
    assert set(record.seconds) == {"copy", "check", "dense pass", "prune", "assemble"}
    assert [layer.index for layer in record.layers] == [0, 1, 2, 3]
    assert all(set(layer.seconds) == {"read", "statistics", "solve", "propagate"} for layer in record.layers)
    assert sum(layer.parameters_before for layer in record.layers) == record.decoder_parameters_before
    assert sum(layer.parameters_after for layer in record.layers) == record.decoder_parameters_after
    assert record.decoder_sparsity == pytest.approx(0.3, abs=0.01)
    assert record.total_sparsity < record.decoder_sparsity


def test_every_worker_that_took_part_has_its_peak_memory(run, calls):
    _, record = run(workers=3)
    assert len(record.peak_memory_workers) == 3


def test_the_record_is_read_back_as_it_was_written(pruned):
    folder, record = pruned
    assert load_record(folder) == inspect(folder) == record
    assert json.loads(json.dumps(asdict(record))) == json.loads((folder / "distprune_run.json").read_text())


@pytest.mark.parametrize("content", [None, "{}", "[]", "not JSON", '{"layers": [{}]}'])
def test_a_folder_without_a_record_is_bad_input(tmp_path, content):
    if content is not None:
        (tmp_path / "distprune_run.json").write_text(content)
    with pytest.raises(InputError, match=r"distprune_run\.json: "):
        inspect(tmp_path)


def test_the_fingerprint_depends_on_what_changes_the_result_alone(run, pruned):
    _, record = pruned
    _, elsewhere = run(sparsity=0.3, max_shard_size=60_000, workers=2)
    _, other = run(sparsity=0.3, max_shard_size=60_000, options={"k": 2.0})
    assert elsewhere.fingerprint == record.fingerprint != other.fingerprint


def test_without_a_calibration_set_the_model_writes_its_own(run, dense_path, digests, tmp_path):
    model = shutil.copytree(dense_path, tmp_path / "model")
    # As if an earlier run had made the model: what that run left must not pass for this run's.
    own = "calibration.arrow", "distprune_config.yaml", "distprune_log.jsonl", "distprune_run.json", "report.html"
    for name in own:
        (model / name).write_text("left by an earlier run")
    options = {"calibration": None, "samples": 4, "sequence_length": 12}
    (folder, record), (again, _), (other, _) = (run(model, **options, seed=seed) for seed in (5, 5, 6))

    calibration = open_calibration(folder / "calibration.arrow")
    assert calibration.tokens.shape == (4, 12)
    assert calibration.metadata.self_generated
    assert calibration.metadata.seed == 5
    assert load_record(folder) == record
    assert "earlier run" not in (folder / "report.html").read_text()
    assert digests(folder) == digests(again) != digests(other)
    assert calibration.fingerprint == open_calibration(again / "calibration.arrow").fingerprint


def test_tokenizer_and_generation_config_travel_along_and_an_old_calibration_set_does_not(pruned, dense_path, run):
    names = {file.name for file in pruned[0].iterdir() if "safetensors" not in file.name}
    assert names == {
        "README.md",
        "config.json",
        "distprune_config.yaml",
        "distprune_log.jsonl",
        "distprune_run.json",
        "generation_config.json",
        "modeling_pruned.py",
        "pruned_attention.py",
        "pruned_layers.py",
        "pruned_projections.py",
        "report.html",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_what_solvers_warn_of_is_told_and_recorded(run):
    notes = []

    class Notes(Progress):
        def note(self, text):
            notes.append(text)

    options = {"progress": Notes(), "method": "oops", "options": {"radius": 1e-3, "damping": 1e-9, "attention": False}}
    folder, record = run(sparsity=0.3, **options)
    warnings = [f"layer {layer.index}: {text}" for layer in record.layers for text in layer.warnings]
    assert sorted(warnings) == sorted(notes)
    assert load_record(folder) == record


def test_the_record_tells_how_distillation_went(run):
    folder, record = run(sparsity=0.3, distill={"epochs": 3, "batch": 4, "learning_rate": 1e-3})
    assert "distill" in record.seconds
    for layer in record.layers:
        learning = layer.distillation
        assert len(learning.training) == 3 * 2
        assert learning.kept == (learning.held_out_after < learning.held_out_before)
    assert load_record(folder) == record


def test_distillation_runs_ahead_of_what_has_learnt_by_a_few_layers_at_most(run, save_model, monkeypatch):
    started = []
    start = WorkerPool._start
    monkeypatch.setattr(
        WorkerPool, "_start", lambda pool, attempt: started.append(attempt.task) or start(pool, attempt)
    )
    run(save_model(num_hidden_layers=8), sparsity=0.3, distill=True)
    kinds = [task.kind() for task in started]
    ahead = [kinds[:end].count("advance") - kinds[:end].count("distill") for end in range(len(kinds))]
    assert kinds.count("advance") == kinds.count("distill") == 8
    assert max(ahead) <= 2 + 1  # as many layers as may learn, and the one looked ahead to


class Raises(Progress):
    """Raises in the stage of a name."""

    def __init__(self, name: str, error: BaseException):
        self.name, self.error = name, error

    def stage(self, name, total, done=0):
        if name == self.name:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of luck")])
def test_a_run_that_did_nothing_yet_leaves_nothing(run, tmp_path, error):
    with pytest.raises(type(error)):
        run(output=tmp_path / "pruned", progress=Raises("Checking weights", error))
    assert os.listdir(tmp_path) == []


def test_an_overwriting_run_that_fails_leaves_the_old_result(run, pruned, digests, tmp_path):
    output = shutil.copytree(pruned[0], tmp_path / "pruned")
    with pytest.raises(KeyboardInterrupt):
        run(output=output, overwrite=True, progress=Raises("Assembling", KeyboardInterrupt()))
    assert digests(output) == digests(pruned[0])
    assert sorted(os.listdir(tmp_path)) == ["pruned", "pruned.partial"]


def test_two_runs_never_write_to_the_same_output(run, tmp_path):
    class Second(Progress):
        def stage(self, name, total, done=0):
            if name == "Pruning":
                with pytest.raises(InputError, match="another run is writing to"):
                    run(output=tmp_path / "pruned")

    folder, _ = run(output=tmp_path / "pruned", progress=Second())
    assert (folder / "config.json").is_file()


def test_bad_input_in_a_worker_is_bad_input_here_and_other_errors_keep_their_traceback(ray_cluster):
    @ray.remote
    def fail(error):
        raise error

    with pytest.raises(InputError, match=r"^tensor t is bad$"):
        fetch(fail.remote(InputError("tensor t is bad")))
    with pytest.raises(RayTaskError, match=r"(?s)raise error.*RuntimeError: a mistake"):
        fetch(fail.remote(RuntimeError("a mistake")))
