"""What perplexity is taken on: the documents of whatever calibration can read, in place of the file as it stands."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distprune import api
from distprune.calibration import load_tokenizer
from distprune.calibration.whole_model import load_model
from distprune.comparison.checking_runs import check_text
from distprune.comparison.scoring import Evaluation, evaluate_apart
from distprune.config import PruneConfig
from distprune.errors import InputError
from distprune.evaluation import evaluate_perplexity, perplexity_of_model

DOCUMENTS = ["The river runs down to the sea.", "", 'A "pruner", they say, takes away.\nIt mends what is left.'] * 6
CSV = "text,n\n" + "".join('"' + document.replace('"', '""') + '",1\n' for document in DOCUMENTS)


def jsonl(documents: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"n": 1, field: document}) + "\n" for document in documents)


def parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": DOCUMENTS, "n": [1] * len(DOCUMENTS)}), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_text(jsonl(DOCUMENTS)),
    "a.json": lambda path: path.write_text(json.dumps([{"text": document} for document in DOCUMENTS])),
    "a.csv": lambda path: path.write_text(CSV),
    "a.parquet": parquet,
    "a.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(DOCUMENTS).encode())),
    "a.txt.gz": lambda path: path.write_bytes(gzip.compress("\n\n".join(DOCUMENTS).encode())),
}


@pytest.fixture(scope="session")
def expected(model, tokenizer) -> float:
    """On the text that the files hold, by the loaded model."""
    return perplexity_of_model(model, tokenizer, "\n\n".join(DOCUMENTS), 16).nll


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_records_give_the_perplexity_of_the_text_in_them(model_path, expected, tmp_path, name):
    WRITERS[name](tmp_path / name)
    [found] = api.evaluate(str(model_path), tmp_path / name, sequence_length=16, device="cpu", dtype="float32")
    assert found.perplexity.nll == pytest.approx(expected, rel=1e-9)


def test_a_dataset_of_the_hub_is_read_by_its_name(model_path, expected, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_dict({"text": DOCUMENTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert evaluate_perplexity(model_path, "someone/books:plain:test", 16).nll == pytest.approx(expected, rel=1e-9)
    assert asked == [("someone/books", "plain", "test")]


def test_another_field_is_chosen_by_name(model_path, expected, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(DOCUMENTS, "body"))
    with pytest.raises(InputError, match=r"no field 'text'.*The fields are n, body; choose one with --field"):
        api.evaluate(str(model_path), path, sequence_length=16)
    [found] = api.evaluate(str(model_path), path, field="body", sequence_length=16, device="cpu")
    assert found.perplexity.nll == pytest.approx(expected, rel=1e-9)


def test_conversations_are_written_out_by_the_chat_template(model_path, tmp_path):
    path = tmp_path / "a.jsonl"
    said = [{"role": "user", "content": "Where does the river run?"}, {"role": "assistant", "content": "To the sea."}]
    path.write_text((json.dumps({"messages": said}) + "\n") * 5)
    with pytest.raises(InputError, match="the model's tokenizer has no chat template"):
        evaluate_perplexity(model_path, path, 16)

    tokenizer, folder = load_tokenizer(model_path), tmp_path / "chatty"
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    model = load_model(model_path, "cpu")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    text = "\n\n".join(["user: Where does the river run?\nassistant: To the sea.\n"] * 5)
    expected = perplexity_of_model(model, tokenizer, text, 16).nll
    assert evaluate_perplexity(folder, path, 16, device="cpu").nll == pytest.approx(expected, rel=1e-9)


def test_a_comparison_reads_records_too(model_path, expected, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(jsonl(DOCUMENTS, "body"))
    config = PruneConfig(model="m", output="o", dtype="float32", device="cpu")
    evaluation = Evaluation(path, length=16, field="body")
    assert evaluate_apart(model_path, evaluation, config) == pytest.approx(2.718281828459045**expected, rel=1e-6)


def test_a_comparison_counts_the_tokens_of_the_text_and_not_of_its_file(dense_path, calibration_path, tmp_path):
    from distprune.engine.run.preflight import check_job

    config = {"model": str(dense_path), "output": tmp_path / "o", "method": "olica", "calibration": calibration_path}
    job = check_job(PruneConfig(**config))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "The sea.", "note": "The river runs down to the sea. " * 50}))
    with pytest.raises(InputError, match=r"a\.jsonl: has \d tokens, fewer than one window of 64"):
        check_text(Evaluation(path, length=64), job)
