"""A pipeline run again and again: what has changed is done, and nothing else."""

from __future__ import annotations

import json
import shutil
import time

import pytest
from local_hub import REPOSITORY, join, serving

from distprune import InputError, api
from distprune.engine.telemetry.progress import Progress
from distprune.evaluation import evaluate_perplexity

STEPS = ["calibrate", "evaluate-dense", "prune-20", "prune-30", "evaluate-20", "evaluate-30"]


def states(summary) -> dict[str, str]:
    return {step.name: step.state for step in summary.steps}


def done(summary) -> list[str]:
    return [name for name, state in states(summary).items() if state == "done"]


@pytest.fixture
def reasons():
    return lambda summary: {step.name: step.reason for step in summary.steps if step.state == "done"}


def test_the_second_run_does_nothing_and_sums_up_the_same(run_pipeline, settings, work, dense_path, text_path):
    first = run_pipeline()
    assert states(first) == dict.fromkeys(STEPS, "done")
    began = time.monotonic()
    second = run_pipeline()
    assert time.monotonic() - began < 5
    assert states(second) == dict.fromkeys(STEPS, "unchanged")
    assert (first.results, first.dense) == (second.results, second.dense)
    assert json.loads((work / "summary.json").read_text()) == json.loads(second.to_json())

    assert (first.state, first.error, first.commit) == ("passed", None, None)
    assert first.dense["perplexity"] == evaluate_perplexity(dense_path, text_path, 16).perplexity
    for result, sparsity in zip(first.results, settings["sparsities"], strict=True):
        record, name = api.inspect(result.checkpoint), f"{100 * sparsity:g}"
        assert (result.percent, result.checkpoint) == (name, str(work / f"pruned-{name}"))
        assert result.sparsity_reached == record.decoder_sparsity == pytest.approx(sparsity, abs=0.01)
        assert result.total_parameters == record.total_parameters_after
        assert result.total_parameters_times_dense == 1 - record.total_sparsity
        perplexity = evaluate_perplexity(work / f"pruned-{name}", text_path, 16).perplexity
        assert result.perplexity.value == perplexity
        assert result.perplexity.times_dense == perplexity / first.dense["perplexity"]
        assert result.passed


def test_each_change_repeats_what_depends_on_it_and_says_why(run_pipeline, settings, work, text_path, reasons):
    run_pipeline()
    assert done(run_pipeline({"sparsities": [0.2, 0.3, 0.1]})) == ["prune-10", "evaluate-10"]

    settings["evaluate"]["max_tokens"] = 64
    found = reasons(run_pipeline())
    assert found == dict.fromkeys(["evaluate-dense", "evaluate-20", "evaluate-30"], "changed: max_tokens")

    settings["evaluate"]["text"] = str(shutil.copy(text_path, text_path.with_name("moved.txt")))
    assert done(run_pipeline()) == []

    text_path.write_text(text_path.read_text().replace("river", "brook"))
    found = reasons(run_pipeline())
    assert found["calibrate"] == "changed: text"
    assert found["prune-20"] == "changed: calibration"
    assert set(found) == set(STEPS) - {"evaluate-dense"}

    shutil.rmtree(work / "pruned-20")
    assert reasons(run_pipeline()) == {"prune-20": "its output is gone"}

    settings["prune"]["workers"] = 2  # where a run happens decides nothing
    assert done(run_pipeline()) == []
    assert done(run_pipeline(restart=True)) == STEPS


def test_another_version_of_distprune_repeats_all(run_pipeline, monkeypatch):
    run_pipeline({"sparsities": [0.3]})
    for module in ("step", "course"):
        monkeypatch.setattr(f"distprune.pipeline.{module}.__version__", "9.9")
    monkeypatch.setattr("distprune.engine.run.preflight.__version__", "9.9")
    summary = run_pipeline({"sparsities": [0.3]})
    assert set(states(summary).values()) == {"done"}
    assert {step.reason for step in summary.steps} == {"changed: distprune"} | {
        "changed: calibration",
        "changed: model",
    }


def test_texts_that_give_the_same_windows_prune_nothing_again(run_pipeline, settings, calls, text_path, tmp_path):
    """The fingerprint of the run is what counts, so a fast step may repeat and the long ones not."""
    run_pipeline({"sparsities": [0.3]})
    calls.clear()
    settings["calibration"]["field"] = "text"  # of records, which a plain text has none of
    assert "prune-30" in done(run_pipeline({"sparsities": [0.3]}))
    assert calls == []


def test_the_model_writes_its_own_samples_once(run_pipeline, settings, calls, work):
    settings["calibration"] = {"samples": 4, "sequence_length": 12}
    run_pipeline()
    assert [kind for kind, _ in calls].count("write_own_samples") == 1
    assert (work / "calibration.arrow").is_file()
    calls.clear()
    assert done(run_pipeline()) == []
    assert calls == []


def test_a_calibration_set_may_be_given_and_distillation_may_have_one_of_its_own(
    run_pipeline, settings, calibration_path, work, text_path
):
    settings["calibration"] = str(calibration_path)
    settings["distill"] = {
        "objective": "layers",
        "calibration": {"text": str(text_path), "samples": 8, "sequence_length": 16},
    }
    summary = run_pipeline({"sparsities": [0.3]})
    assert list(states(summary)) == ["calibrate-distill", "evaluate-dense", "prune-30", "evaluate-30"]
    assert all(layer.distillation for layer in api.inspect(work / "pruned-30").layers)


def test_a_dry_run_tells_what_would_be_done_and_does_nothing(run_pipeline, work):
    summary = run_pipeline(dry_run=True)
    assert (summary.state, states(summary)) == ("dry run", dict.fromkeys(STEPS, "would run"))
    assert not list(work.glob("*"))
    run_pipeline()
    summary = run_pipeline({"sparsities": [0.3, 0.1]}, dry_run=True)
    assert [name for name, state in states(summary).items() if state == "would run"] == ["prune-10", "evaluate-10"]


class StopsIn(Progress):
    """Interrupts the first pruning run in its second layer."""

    stopped = False

    def stage(self, name, total, done=0):
        self.name, self.done = name, 0

    def advance(self):
        self.done += 1
        if self.name == "Pruning" and self.done == 2 and not StopsIn.stopped:
            StopsIn.stopped = True
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(run_pipeline, monkeypatch, work):
    """A pipeline that was interrupted while it pruned to 20%."""
    monkeypatch.setattr(StopsIn, "stopped", False)
    with pytest.raises(KeyboardInterrupt):
        run_pipeline(progress=StopsIn)
    summary = json.loads((work / "summary.json").read_text())
    assert summary["state"] == "interrupted"
    assert [step["state"] for step in summary["steps"]] == ["done", "done", "interrupted", *["skipped"] * 3]


def test_an_interrupted_pipeline_resumes_inside_the_run(interrupted, run_pipeline, calls, run, work, digests):
    summary = run_pipeline()
    assert done(summary) == STEPS[2:]
    assert [kind for kind, _ in calls].count("open_forward") == 4  # of the second run alone
    folder, _ = run(sparsity=0.2, calibration=work / "calibration.arrow")
    assert digests(work / "pruned-20") == digests(folder)


def test_what_another_configuration_has_left_is_begun_anew(interrupted, run_pipeline, run, work, digests, settings):
    settings["prune"]["propagation"] = 1
    run_pipeline()
    folder, _ = run(sparsity=0.2, calibration=work / "calibration.arrow", propagation=1)
    assert digests(work / "pruned-20") == digests(folder)


def test_a_result_that_is_there_is_taken_though_nothing_says_so(run_pipeline, calls, work):
    """As when the machine failed between the last rename of a run and the record of its step."""
    run_pipeline()
    (work / "steps" / "prune-30.json").unlink()
    (work / "steps" / "prune-20.json").write_text('{"fingerprint": "')
    calls.clear()
    assert done(run_pipeline()) == ["prune-20", "prune-30"]
    assert calls == []


def test_one_pipeline_at_a_time_works_in_a_folder(run_pipeline):
    class RunsAnother(Progress):
        def stage(self, name, total, done=0):
            with pytest.raises(InputError, match=r"another run is writing to .*work"):
                run_pipeline()
            raise InterruptedError("seen")

    with pytest.raises(InterruptedError):
        run_pipeline(progress=RunsAnother)


def test_a_new_commit_of_a_hub_model_repeats_all(run_pipeline, settings, dense_path, tmp_path, monkeypatch, reasons):
    settings |= {"model": REPOSITORY, "revision": "main", "sparsities": [0.3]}
    settings["prune"]["weights"] = "shared"
    with serving(dense_path) as hub:
        join(hub, tmp_path / "cache", monkeypatch)
        first = run_pipeline()
        assert (first.commit, done(first)) == (hub.commit, ["calibrate", "evaluate-dense", "prune-30", "evaluate-30"])
        assert done(run_pipeline()) == []
        hub.commit = "f" * 40
        second = run_pipeline()
    assert second.commit == hub.commit
    found = reasons(second)
    assert {found[name] for name in ("calibrate", "evaluate-dense", "evaluate-30")} == {"changed: model"}
    assert found["prune-30"] == "changed: calibration, model"
