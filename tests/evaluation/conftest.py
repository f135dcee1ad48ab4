"""What evaluations are tried on: text, and a folder of lm-eval's tasks with their questions in local files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

TEXT = "The river runs down to the sea, and a pruner mends what is left of the model. " * 12

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %s, train: %s}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_choice: "{{choices}}"
target_delimiter: " "
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""

GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{target}}"
generation_kwargs: {until: ["."], max_gen_toks: 6, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
  - {metric: bleu, aggregation: bleu, higher_is_better: true}
filter_list:
  - name: as-is
    filter: [{function: take_first}]
  - name: first-letter
    filter: [{function: regex, regex_pattern: "([a-z])"}, {function: take_first}]
"""

ROLLING = """
task: tiny_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: word_perplexity}
  - {metric: bits_per_byte}
"""


@pytest.fixture(scope="session", autouse=True)
def only_our_tasks():
    """Reading the thousands of tasks that come with lm-eval takes six seconds each time."""
    init = TaskManager.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskManager, "__init__", lambda self, **options: init(self, **options, include_defaults=False))
        yield


@pytest.fixture(scope="session")
def text_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def task_folder(tmp_path_factory) -> Path:
    """Three tasks, whose questions differ in length and whose choices have one token or several."""
    folder = tmp_path_factory.mktemp("tasks")
    words = ["river", "sea", "rain", "hills", "model", "pruner", "response", "request"]

    def write(name: str, documents: list[dict]) -> Path:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        return folder / f"{name}.jsonl"

    def question(number: int) -> str:
        return "The " + " and the ".join(words[(number + step) % len(words)] for step in range(1 + number % 4)) + " is"

    choices = [
        {
            "question": question(number),
            "choices": ["a", "b", words[number % len(words)], "what is left of " + words[number % 3]],
            "answer": number % 4,
        }
        for number in range(13)
    ]
    asked = [{"question": question(number), "target": words[number % len(words)]} for number in range(9)]
    long = [{"text": " ".join(words[(number * step) % len(words)] for step in range(40))} for number in range(5)]
    test, train = write("choice", choices[:11]), write("examples", choices[11:])
    (folder / "choice.yaml").write_text(CHOICE % (test, train))
    (folder / "generation.yaml").write_text(GENERATION % write("generation", asked))
    (folder / "rolling.yaml").write_text(ROLLING % write("rolling", long))
    return folder
