"""SmolLM2-135M, dense beside pruned, on questions that it can answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval_alone import lm_eval_alone
from smollm2 import bundled_smollm2

import distprune
from distprune.checkpoint import resolve_model

pytestmark = pytest.mark.slow

CAPITALS = {
    "France": "Paris",
    "Italy": "Rome",
    "Germany": "Berlin",
    "Spain": "Madrid",
    "Japan": "Tokyo",
    "Russia": "Moscow",
    "China": "Beijing",
    "Egypt": "Cairo",
    "Greece": "Athens",
    "Portugal": "Lisbon",
}
CHOICE = """
task: capitals
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "The capital of {{country}} is"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
"""
GENERATION = """
task: counting
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{start}}"
doc_to_target: "{{next}}"
generation_kwargs: {until: [","], max_gen_toks: 8, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true, ignore_punctuation: true}
filter_list:
  - name: number
    filter: [{function: regex, regex_pattern: "([0-9]+)"}, {function: take_first}]
"""
TASKS = ("capitals", "counting")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two tasks: capitals to choose, and numbers to go on with."""
    folder, cities = tmp_path_factory.mktemp("tasks"), [*CAPITALS.values()]
    choices = [
        {"country": country, "choices": cities, "answer": cities.index(city)} for country, city in CAPITALS.items()
    ]
    counts = [
        {"start": "".join(f" {first + step}," for step in range(6)).strip(), "next": str(first + 6)}
        for first in range(1, 40, 4)
    ]
    for name, template, documents in (("capitals", CHOICE, choices), ("counting", GENERATION, counts)):
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(document) + "\n" for document in documents))
        (folder / f"{name}.yaml").write_text(template % data)
    return folder


def test_dense_and_pruned_stand_side_by_side(new_workers, folder, tmp_path):
    dense = resolve_model(str(bundled_smollm2()))
    pruned = tmp_path / "pruned"
    how = {"method": "magnitude", "workers": 2, "device": "cpu", "samples": 16, "sequence_length": 64}
    distprune.prune(str(dense), pruned, sparsity=0.3, **how)
    text = tmp_path / "text.jsonl"
    lines = [f"The capital of {country} is {city}, and many people live there." for country, city in CAPITALS.items()]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))

    given = {"tasks": TASKS, "include_path": folder, "batch_size": 4, "device": "cpu", "dtype": "float32"}
    found = distprune.evaluate([str(dense), str(pruned)], text, sequence_length=32, **given)
    assert found[0].tasks["capitals"]["acc"] >= 0.5
    assert found[0].tasks["counting"]["exact_match,number"] >= 0.5
    assert found[1].tasks["counting"]["exact_match,number"] < found[0].tasks["counting"]["exact_match,number"]
    assert found[1].perplexity.perplexity > found[0].perplexity.perplexity
    for evaluation, model in zip(found, (dense, pruned), strict=True):
        assert evaluation.tasks == lm_eval_alone(model, TASKS, folder, tmp_path / f"alone-{model.name}", 4)

    [by_two] = distprune.evaluate(str(pruned), text, sequence_length=32, workers=2, **given)
    assert by_two.tasks == found[1].tasks
    assert by_two.perplexity.nll == found[1].perplexity.nll
