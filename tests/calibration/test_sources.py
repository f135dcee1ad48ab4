from __future__ import annotations

import builtins
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distprune.calibration.sources import read_source
from distprune.errors import InputError

ALPACA = [
    {"instruction": "Name a colour.", "input": "", "output": "Blue."},
    {"instruction": "Translate.", "input": "chat", "output": "cat"},
]
ALPACA_DOCUMENTS = [
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nName a colour.\n\n### Response:\nBlue.",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\nTranslate.\n\n### Input:\nchat\n\n### Response:\ncat",
]


def jsonl(path, records):
    path.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "plain"])
def test_a_plain_text_file_is_one_document(tmp_path, name):
    path = tmp_path / name
    path.write_text("One.\n\nTwo ☃.\n", encoding="utf-8")
    source = read_source(str(path))
    assert source.documents == ["One.\n\nTwo ☃.\n"]
    assert (source.name, source.from_start) == (name, False)


def test_jsonl_takes_the_text_field_by_default_and_skips_blank_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "id": 1}\n\n{"text": "two"}\n')
    source = read_source(path)
    assert source.documents == ["one", "two"]
    assert not source.from_start


def test_jsonl_takes_the_field_asked_for(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "no", "body": "yes"}])
    assert read_source(path, "body").documents == ["yes"]


def test_a_line_separator_inside_a_json_string_does_not_end_the_line(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one\u2028two"}])
    assert read_source(path).documents == ["one\u2028two"]


def test_instruction_records_get_the_alpaca_prompts_and_are_read_from_their_start(tmp_path):
    source = read_source(jsonl(tmp_path / "a.jsonl", ALPACA))
    assert source.documents == ALPACA_DOCUMENTS
    assert source.from_start


def test_an_instruction_record_may_lack_its_input(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"instruction": "Name a colour.", "output": "Blue."}])
    assert read_source(path).documents == ALPACA_DOCUMENTS[:1]


def test_a_field_asked_for_wins_over_the_alpaca_prompt(tmp_path):
    source = read_source(jsonl(tmp_path / "a.jsonl", ALPACA), "output")
    assert source.documents == ["Blue.", "cat"]
    assert not source.from_start


def test_a_json_array_is_read_like_json_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(ALPACA, indent=1))
    assert read_source(path).documents == ALPACA_DOCUMENTS


def test_parquet_follows_the_rules_of_records(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["one", None, "two"]}), path)
    assert read_source(path).documents == ["one", "", "two"]
    pq.write_table(pa.Table.from_pylist(ALPACA), path)
    assert read_source(path).documents == ALPACA_DOCUMENTS


@pytest.mark.parametrize(
    ("source", "call"),
    [
        ("someone/corpus", ("someone/corpus", None, "train")),
        ("corpus:small", ("corpus", "small", "train")),
        ("corpus:small:test", ("corpus", "small", "test")),
        ("corpus::validation", ("corpus", None, "validation")),
    ],
)
def test_a_dataset_name_carries_config_and_split(monkeypatch, source, call):
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_dict({"id": [1, 2], "text": ["one", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = read_source(source)
    assert calls == [call]
    assert (found.name, found.documents) == (source, ["one", "two"])


def test_instruction_datasets_get_the_alpaca_prompts(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_list(ALPACA))
    assert read_source("someone/alpaca").documents == ALPACA_DOCUMENTS


def test_a_dataset_out_of_reach_is_refused_with_the_reason(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"someone/corpus: no such file, and .*no route to the hub"):
        read_source("someone/corpus")


def test_a_dataset_without_the_package_is_refused_with_the_mend(monkeypatch):
    real_import = builtins.__import__

    def no_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(InputError, match="install the package 'datasets'"):
        read_source("someone/corpus")


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/nowhere/missing", "sub/missing.jsonl"])
def test_a_missing_file_is_refused_without_asking_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read_source(name)


def test_a_broken_json_line_is_named_by_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"\n')
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: is not valid JSON"):
        read_source(path)


def test_a_broken_json_array_is_named(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n{"text": "one"},\n')
    with pytest.raises(InputError, match=r"a\.json: is not valid JSON .* line "):
        read_source(path)


def test_a_json_line_that_is_no_object_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n3\n')
    with pytest.raises(InputError, match=r"line 2: holds int"):
        read_source(path)


def test_a_missing_field_lists_the_fields_present(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"title": "t", "body": "b"}])
    with pytest.raises(InputError, match=r"line 1: no field 'text', nor 'instruction'.* title, body; .*--field"):
        read_source(path)
    with pytest.raises(InputError, match=r"line 1: no field 'content'\. The fields are title, body"):
        read_source(path, "content")


def test_a_missing_parquet_column_lists_the_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"title": ["t"], "body": ["b"]}), path)
    with pytest.raises(InputError, match=r"a\.parquet: no field 'text'.* title, body"):
        read_source(path)


def test_a_missing_dataset_column_lists_the_columns(monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: datasets.Dataset.from_dict({"title": ["t"]}))
    with pytest.raises(InputError, match=r"someone/corpus: no field 'text'.* title"):
        read_source("someone/corpus")


def test_a_field_that_holds_no_text_is_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": ["two"]}])
    with pytest.raises(InputError, match=r"line 2: field 'text' holds list, not text"):
        read_source(path)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_a_source_without_text_is_refused(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(InputError, match="holds no text"):
        read_source(path)


def test_an_empty_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_source(path)


def test_bytes_that_are_not_utf8_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"caf\xe9 noir")
    with pytest.raises(InputError, match=r"a\.txt: is not UTF-8 text \(byte 3\)"):
        read_source(path)


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        read_source(tmp_path)
