"""What a pipeline publishes: the results that pass its gate, once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import fsspec
import pytest
from html_pages import read_page

import distprune
from distprune import InputError
from distprune.errors import GateFailed
from distprune.pipeline import evaluate_step
from distprune.pipeline.measuring import Measured

EVERYTHING, NOTHING = {"perplexity": {"at_most": 1e9}}, {"perplexity": {"at_most": 1.0}}


def publishing(summary) -> dict[str, str]:
    """State of the publishing steps by sparsity."""
    return {step.name.split("-")[1]: step.state for step in summary.steps if step.name.startswith("publish")}


@pytest.fixture
def scores(monkeypatch):
    """Gives models made-up perplexities, by the name of their folder."""
    given = {"dense": 10.0, "pruned-20": 11.0, "pruned-30": 15.0}

    def measure(model, *_):
        return Measured(given.get(Path(model).name, given["dense"]), {})

    monkeypatch.setattr(evaluate_step, "measure", measure)
    return given


@pytest.fixture
def shop(tmp_path) -> Path:
    return tmp_path / "shop"


def test_the_most_pruned_result_that_passes_is_published_once(run_pipeline, scores, shop, work):
    changes = {"gate": {"perplexity": {"at_most_times_dense": 1.2}}, "publish": {"to": [f"{shop}/m-{{percent}}"]}}
    summary = run_pipeline(changes)
    assert (summary.state, publishing(summary)) == ("passed", {"20": "done", "30": "skipped"})
    assert [(result.passed, list(result.published)) for result in summary.results] == [
        (True, [f"{shop}/m-20"]),
        (False, []),
    ]
    (miss,) = summary.results[1].misses
    assert str(miss) == "perplexity 15 is above 12 (at_most_times_dense)"
    assert summary.results[1].perplexity.times_dense == 1.5
    assert os.listdir(shop) == ["m-20"]
    distprune.load(shop / "m-20")

    made = (shop / "m-20").stat().st_ino
    assert publishing(run_pipeline(changes)) == {"20": "unchanged", "30": "skipped"}
    assert (shop / "m-20").stat().st_ino == made
    shutil.rmtree(shop / "m-20")
    assert publishing(run_pipeline(changes)) == {"20": "done", "30": "skipped"}


@pytest.mark.parametrize(
    ("which", "published"), [("smallest", ["m-30"]), ("best", ["m-20"]), ("all", ["m-20", "m-30"])]
)
def test_which_of_those_that_pass_is_chosen(run_pipeline, scores, shop, which, published):
    run_pipeline({"gate": EVERYTHING, "publish": {"to": f"{shop}/m-{{percent}}", "which": which}})
    assert sorted(os.listdir(shop)) == published


def test_a_gate_that_nothing_passes_publishes_nothing_and_says_why(run_pipeline, scores, shop, work):
    with pytest.raises(GateFailed, match=r"nothing is published: at 20%, perplexity 11 is above 1 \(at_most\); at 30%"):
        run_pipeline({"gate": NOTHING, "publish": {"to": f"{shop}/m"}})
    assert not list(shop.glob("*"))
    summary = json.loads((work / "summary.json").read_text())
    assert summary["state"] == "gate failed"
    assert [step["state"] for step in summary["steps"] if step["name"].startswith("publish")] == ["skipped"] * 2
    assert summary["results"][0]["misses"] == [
        {
            "metric": "perplexity",
            "value": 11.0,
            "bound": "at_most",
            "limit": 1.0,
            "message": "perplexity 11 is above 1 (at_most)",
        }
    ]


def test_a_number_that_is_not_finite_is_null_in_json(run_pipeline, scores, work):
    scores["pruned-30"] = float("inf")
    with pytest.raises(GateFailed, match="perplexity is inf, which is no number to ship"):
        run_pipeline({"gate": NOTHING})

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    summary = json.loads((work / "summary.json").read_text(), parse_constant=refuse)
    assert summary["results"][1]["perplexity"] == {"value": None, "times_dense": None}


def test_a_result_that_was_published_is_replaced_by_the_next_with_overwrite_alone(run_pipeline, scores, shop):
    """As when the model has a new commit, here another seed of the calibration."""
    publish = {"to": f"{shop}/m", "overwrite": True}
    run_pipeline({"publish": publish})
    before = (shop / "m" / "distprune_run.json").read_text()
    changed = {"calibration": {"samples": 4, "sequence_length": 16, "seed": 1}}
    with pytest.raises(InputError, match=r"publish: .*shop/m exists\. Choose another .*, or allow overwriting"):
        run_pipeline({"publish": {"to": f"{shop}/m"}, **changed})
    assert (shop / "m" / "distprune_run.json").read_text() == before
    summary = run_pipeline({"publish": publish, **changed})
    assert publishing(summary) == {"20": "skipped", "30": "done"}
    assert (shop / "m" / "distprune_run.json").read_text() != before
    # Another gate lets another result through, and then the first one again.
    held_back = {"gate": {"perplexity": {"at_most": 12}}, "publish": publish, **changed}
    assert publishing(run_pipeline(held_back)) == {"20": "done", "30": "skipped"}
    assert publishing(run_pipeline({"publish": publish, **changed})) == {"20": "skipped", "30": "done"}


def test_a_model_is_published_with_its_report(run_pipeline, scores, shop):
    run_pipeline({"publish": {"to": f"{shop}/m"}})
    record = json.loads((shop / "m" / "distprune_run.json").read_text())
    assert read_page(shop / "m" / "report.html").texts["fingerprint"] == record["fingerprint"]


def test_what_was_published_by_a_pipeline_that_could_not_say_so_is_not_published_again(
    run_pipeline, scores, shop, work
):
    changes = {"publish": {"to": f"{shop}/m-{{percent}}"}}
    run_pipeline(changes)
    made = (shop / "m-30").stat().st_ino
    (step,) = (work / "steps").glob("publish-*")
    step.unlink()
    assert publishing(run_pipeline(changes)) == {"20": "skipped", "30": "done"}
    assert (shop / "m-30").stat().st_ino == made


def test_a_pipeline_publishes_in_an_object_store(run_pipeline, scores, s3_environment, work):
    storage = fsspec.filesystem("s3", skip_instance_cache=True)
    storage.mkdir("pipeline")
    changes = {"publish": {"to": ["s3://pipeline/m-{percent}"], "which": "all"}}
    assert publishing(run_pipeline(changes)) == {"20": "done", "30": "done"}
    for percent in ("20", "30"):
        folder = work / f"pruned-{percent}"
        for file in folder.iterdir():
            assert storage.cat_file(f"pipeline/m-{percent}/{file.name}") == file.read_bytes()
    assert publishing(run_pipeline(changes)) == {"20": "unchanged", "30": "unchanged"}
    storage.rm("pipeline/m-20", recursive=True)
    assert publishing(run_pipeline(changes)) == {"20": "done", "30": "unchanged"}
