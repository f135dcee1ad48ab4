"""A pipeline's YAML: what is wrong in it is named with the file, the option and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from distprune import InputError
from distprune.pipeline import load_pipeline

LEAST = {"model": "m", "work": "w", "sparsities": [0.3], "evaluate": {"text": "t.txt"}}


@pytest.fixture
def load(tmp_path):
    def load(changes: dict | str):
        file = tmp_path / "pipeline.yaml"
        file.write_text(changes if isinstance(changes, str) else yaml.safe_dump({**LEAST, **changes}))
        return load_pipeline(file)

    return load


def test_one_stands_for_a_list_and_a_path_for_a_calibration_set(load):
    config = load({"sparsities": 0.2, "calibration": "c.arrow", "publish": {"to": "/m"}, "distill": True})
    assert config.sparsities == (0.2,)
    assert config.calibration.file == Path("c.arrow")
    assert config.publish.to == ("/m",)
    assert config.distill.objective == "layers"
    assert load({"calibration": {"text": "a.txt"}}).calibration.text == ("a.txt",)


def test_distillation_has_the_defaults_of_its_objective_and_windows_like_the_pruning(load):
    config = load(
        {
            "calibration": {"text": ["a.txt"], "samples": 9, "sequence_length": 2048, "seed": 3},
            "distill": {"objective": "logits", "calibration": {"text": ["b.txt"], "samples": 640}},
        }
    )
    assert (config.distill.train, config.distill.rank) == ("lora", 8)
    own = config.distill_calibration()
    assert (own.text, own.samples, own.sequence_length, own.seed) == (("b.txt",), 640, 2048, 3)


def test_a_range_of_workers_is_a_text_and_not_a_number_of_base_60(load):
    text = yaml.safe_dump(LEAST) + "prune: {workers: 1:8}\n"
    assert load(text).prune == {"workers": "1:8"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsty": 1}, r"'sparsty' is not an option\. Options: model, revision, work, .*trust_remote_code\.$"),
        ({"work": None}, r"option 'work' is None: "),
        ({"evaluate": {}}, r"evaluate: give a text, tasks or both\."),
        ({"evaluate": {"txt": "t"}}, r"evaluate: 'txt' is not an option\. Options: text, field, sequence_length"),
        (
            {"evaluate": {"text": "t", "sequence_length": 1}},
            r"option 'evaluate\.sequence_length' is 1: .*than or equal",
        ),
        ({"sparsities": []}, r"option 'sparsities' is \[\]: "),
        ({"sparsities": [0.2, 1]}, r"sparsities: 1 is not between 0 and 1\."),
        ({"sparsities": [0.2, 0.20]}, r"sparsities: 0\.2 is given twice\."),
        ({"sparsities": ["few"]}, r"option 'sparsities\.0' is 'few': "),
        ({"prune": {"sparsity": 0.3}}, r"prune: 'sparsity' is not given here, but by sparsities\."),
        ({"prune": {"model": "m"}}, r"prune: 'model' is not given here, but by model\."),
        ({"prune": {"propagation": 0}}, r"prune: option 'propagation' is 0: give a number of layers from 1, or 'full'"),
        ({"prune": {"methd": "olica"}}, r"prune: 'methd' is not an option\. Options: model, output, method"),
        ({"calibration": {"file": "a", "samples": 3}}, r"calibration: give either a file, or how to make"),
        ({"calibration": {"samples": 0}}, r"option 'calibration\.samples' is 0: "),
        ({"distill": {"epoch": 2}}, r"distill: 'epoch' is not an option\. Options: objective, calibration, epochs"),
        ({"gate": {"perplexity": {}}}, r"gate\.perplexity: give at least one of at_least, at_most"),
        (
            {"gate": {"perplexity": {"max": 1}}},
            r"gate\.perplexity: 'max' is not an option\. Options: at_least, at_most",
        ),
        (
            {"gate": {"tasks": {"arc": {"acc": {"at_least": 1}}}}},
            r"gate\.tasks\.arc: 'arc' is not among evaluate\.tasks",
        ),
        (
            {"evaluate": {"tasks": ["arc"]}, "gate": {"perplexity": {"at_most": 1}}},
            r"gate\.perplexity needs evaluate\.text\.",
        ),
        ({"publish": {}}, r"option 'publish\.to' must be given\."),
        ({"publish": {"to": []}}, r"option 'publish\.to' is \[\]: "),
        ({"publish": {"to": "/m-{name}"}}, r"publish\.to: '/m-\{name\}' holds \{name\}\. The one placeholder is"),
        ({"publish": {"to": "/m-{"}}, r"publish\.to: '/m-\{': .*The one placeholder is"),
        ({"publish": {"to": ["/m", "/m"]}}, r"publish\.to: '/m' is given twice\."),
        (
            {"publish": {"to": "/m", "which": "worst"}},
            r"option 'publish\.which' is 'worst': .*'smallest', 'best' or 'all'",
        ),
        (
            {"sparsities": [0.2, 0.3], "publish": {"to": "/m", "which": "all"}},
            r"publish\.to: several results would go to '/m'\. Write \{percent\} in it, or give",
        ),
        (
            {"evaluate": {"tasks": "arc"}, "publish": {"to": "/m", "which": "best"}},
            r"publish\.which: best is told by perplexity, so it needs evaluate\.text\.",
        ),
        ("- a list", r"must be a mapping of option names to values"),
        ("model: [", r"is not valid YAML"),
        ("model: m", r"option 'work' must be given\."),
    ],
)
def test_what_is_wrong_is_named_with_the_file(load, changes, message):
    with pytest.raises(InputError, match=rf"pipeline\.yaml: {message}"):
        load(changes)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"none\.yaml: can't be read \(No such file or directory\)\. Check the path\."):
        load_pipeline(tmp_path / "none.yaml")


def test_a_pattern_of_tasks_stands_for_those_that_it_matches(load):
    config = load({"evaluate": {"tasks": ["arc_*"]}, "gate": {"tasks": {"arc_easy": {"acc": {"at_least": 0.5}}}}})
    assert config.gate.tasks["arc_easy"]["acc"].at_least == 0.5
