"""The search: its plan is measured to be better, its library gives further checkpoints, and its bytes are the same."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from distprune import InputError, load, plan_from
from distprune.calibration import open_calibration
from distprune.engine.run.library import Library
from distprune.engine.worker.library_tasks import SolvePart

SEARCH = {"method": "curvature", "distill": False, "sparsity": 0.6, "search": {"samples": 2, "steps": 2}}


@pytest.fixture
def library(prune_here, tmp_path):
    """A searched run, and its library."""
    record = prune_here(tmp_path / "searched", library=tmp_path / "library", **SEARCH)
    return tmp_path / "library", record


def test_a_search_leaves_nothing_but_the_checkpoint_and_the_library(library, tmp_path):
    folder, record = library
    assert sorted(path.name for path in tmp_path.iterdir()) == ["library", "searched"]
    assert {"library", "search"} <= set(record.seconds)
    assert abs(record.decoder_sparsity - 0.6) < 0.01
    found = Library.read(folder)
    assert {(part.layer, part.part) for part in found.parts} == {(i, p) for i in range(3) for p in ("attention", "ffn")}
    assert any(price != 1 for price in found.prices)


def perplexity_apart(one, other, tokens):
    """The divergence of one model's predictions from another's, in nats a token."""
    with torch.no_grad():
        one, other = (model(tokens).logits.double().log_softmax(-1) for model in (one, other))
    return float((other.exp() * (other - one)).sum(-1).mean())


def test_what_the_search_measures_is_what_the_parts_together_give(library, llama, calibrate, tmp_path):
    """The first plan, made of the library's parts and run by transformers, diverges as the log says."""
    folder, _ = library
    found = Library.read(folder)
    manifest = json.loads((folder / "library.json").read_text())
    (folder / "library.json").write_text(json.dumps(manifest | {"prices": [1.0] * len(found.parts)}))
    plan_from(folder, tmp_path / "first", device="cpu", workers=1)
    pruned = load(tmp_path / "first")
    dense = AutoModelForCausalLM.from_pretrained(llama)
    tokens = open_calibration(calibrate(llama)).tokens
    held_out = torch.tensor(tokens[np.linspace(0, len(tokens), 2, endpoint=False).astype(int)]).long()
    events = [json.loads(line) for line in (tmp_path / "searched" / "distprune_log.jsonl").read_text().splitlines()]
    [said] = [event["text"] for event in events if "the plan as predicted diverges" in event.get("text", "")]
    assert float(said.split(" by ")[1].split()[0]) == pytest.approx(perplexity_apart(pruned, dense, held_out), rel=1e-3)


def test_a_better_plan_is_better_on_held_out_text(library, tmp_path):
    events = [json.loads(line) for line in (tmp_path / "searched" / "distprune_log.jsonl").read_text().splitlines()]
    measured = [
        float(event["text"].split(" by ")[1].split()[0]) for event in events if "diverges" in event.get("text", "")
    ]
    assert len(measured) > 1
    assert measured == sorted(measured, reverse=True)


@pytest.mark.parametrize(("sparsity", "resource"), [(0.4, "parameters"), (0.7, "parameters"), (0.3, "kv-cache")])
def test_a_library_gives_checkpoints_of_other_sizes(library, llama, tmp_path, sparsity, resource):
    folder, _ = library
    record = plan_from(folder, tmp_path / "other", sparsity=sparsity, target=resource, device="cpu", workers=1)
    model = load(tmp_path / "other")
    assert model(torch.arange(5)[None]).logits.isfinite().all()
    assert record.calibration == Library.read(folder).calibration
    if resource == "parameters":
        assert sparsity <= record.decoder_sparsity < sparsity + 0.05


def test_the_dense_model_comes_back_from_a_library(library, llama, tmp_path):
    folder, _ = library
    plan_from(folder, tmp_path / "whole", sparsity=0.0, device="cpu", workers=1)
    tokens = torch.arange(20)[None]
    dense, whole = AutoModelForCausalLM.from_pretrained(llama), load(tmp_path / "whole")
    assert torch.equal(dense(tokens).logits, whole(tokens).logits)


def test_a_library_of_another_run_is_not_taken_for_ones_own(library, prune_here, tmp_path):
    with pytest.raises(InputError, match="holds the library of a run with other options"):
        prune_here(tmp_path / "again", library=library[0], **SEARCH | {"options": {"refit_damping": 0.1}})


def test_a_run_that_is_repeated_takes_the_library_that_is_there(library, prune_here, digests, monkeypatch, tmp_path):
    monkeypatch.setattr(SolvePart, "run", None)  # nothing is solved again
    prune_here(tmp_path / "again", library=library[0], **SEARCH)
    assert digests(tmp_path / "again") == digests(tmp_path / "searched")


def test_a_run_of_another_size_takes_the_library_that_is_there(library, prune_here, monkeypatch, tmp_path):
    monkeypatch.setattr(SolvePart, "run", None)  # nothing is solved again
    record = prune_here(tmp_path / "again", library=library[0], **SEARCH | {"sparsity": 0.5})
    assert abs(record.decoder_sparsity - 0.5) < 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "flap"}, "--search: method flap has no other plans to offer.* curvature"),
        ({"layout": "stock"}, "--search: with --layout stock all layers are alike"),
        ({"search": {"samples": 1000}}, "--search-samples 1000: of .* windows none would be left"),
        ({"search": None, "library": "somewhere"}, "--library somewhere: it is a search that makes a library"),
    ],
)
def test_a_search_that_can_not_be_made_is_refused(prune_here, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        prune_here(tmp_path / "pruned", **SEARCH | changes)
    assert not list(tmp_path.iterdir())


def test_a_library_that_can_not_be_taken_from_is_refused(library, save_model, tmp_path):
    folder, _ = library
    with pytest.raises(InputError, match="is the library of another model"):
        plan_from(folder, tmp_path / "other", model=str(save_model(num_hidden_layers=3, seed=5)), device="cpu")
    with pytest.raises(InputError, match=r"library\.json: can't be read"):
        plan_from(tmp_path, tmp_path / "other")
    with pytest.raises(InputError, match="Give --distill-calibration"):
        plan_from(folder, tmp_path / "other", distill=True)
