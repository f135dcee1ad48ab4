from __future__ import annotations

import builtins
import copy
import csv
import gzip
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from distprune.calibration.chat import Rendered
from distprune.calibration.text_sources import read_source
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


# ------------------------------------------------------------------ lone surrogates


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (r'{"text": "a\ud800b"}', "a\ufffdb"),
        (r'{"text": "\ud83d\ude00 \udc00"}', "\U0001f600 \ufffd"),
        ('{"text": "a\ud800b"}', "a\ufffdb"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_lone_surrogates_in_json_are_replaced_and_counted(tmp_path, caplog, name, content, expected):
    path = tmp_path / name
    path.write_text(f'{{"text": "whole"}}\n{content}\n', encoding="utf-8", errors="surrogatepass")
    assert read_source(path).documents == ["whole", expected]
    assert [record.name for record in caplog.records] == ["distprune.calibration.text_sources"]
    assert "lone surrogates, which are read as U+FFFD" in caplog.text


def test_records_with_lone_surrogates_are_counted_wherever_the_text_stands(tmp_path, caplog):
    records = [{**ALPACA[0], "output": "\ud800"}, {**ALPACA[1], "input": "\udfff"}, ALPACA[0]]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(record) for record in records))
    assert [document.count("\ufffd") for document in read_source(path).documents] == [1, 1, 0]
    assert f"{path.name}: 2 of its records hold lone surrogates" in caplog.text


def test_lone_surrogates_in_messages_and_in_the_template_are_replaced(tmp_path, tokenizer):
    path, able = tmp_path / "a.jsonl", copy.deepcopy(tokenizer)
    path.write_text(r'{"messages": [{"role": "user", "content": "a\ud800"}]}')
    able.chat_template = "{{ messages[0].content }}\udc00"
    (text,) = Rendered(read_source(path).documents, able)
    assert text == "a\ufffd\ufffd"


def test_lone_surrogates_in_a_text_file_are_replaced_and_told_of(tmp_path, caplog):
    path = tmp_path / "a.txt"
    path.write_bytes("a\ud800b".encode("utf-8", "surrogatepass"))
    assert read_source(path).documents == ["a\ufffdb"]
    assert "a.txt: holds lone surrogates" in caplog.text


def test_a_parquet_text_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"a\xed\xa0\x80"]).view(pa.string())}), path)
    with pytest.raises(InputError, match=r"a\.parquet: holds text that is not UTF-8"):
        read_source(path)


# ------------------------------------------------------------------ compressed files, wrappers and tables


def compressed(path, content: bytes):
    with pa.CompressedOutputStream(str(path), pa.Codec.detect(path.name).name) as stream:
        stream.write(content)
    return path


@pytest.mark.parametrize("ending", ["gz", "bz2", "zst", "GZ"])
@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("a.txt", b"One river.\n", ["One river.\n"]),
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.json", b'[{"text": "one"}]', ["one"]),
        ("a.csv", b"id,text\n1,one\n", ["one"]),
    ],
)
def test_compressed_files_are_read_as_what_they_hold(tmp_path, ending, name, content, documents):
    compressed(tmp_path / f"{name}.{ending.lower()}", content).rename(tmp_path / f"{name}.{ending}")
    assert read_source(tmp_path / f"{name}.{ending}").documents == documents


def test_gzip_files_that_were_joined_are_read_whole(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n') + gzip.compress(b'{"text": "two"}\n'))
    assert read_source(path).documents == ["one", "two"]


def test_parquet_may_be_compressed_once_more(tmp_path):
    pq.write_table(pa.table({"text": ["one"]}), tmp_path / "a.parquet")
    path = compressed(tmp_path / "a.parquet.gz", (tmp_path / "a.parquet").read_bytes())
    assert read_source(path).documents == ["one"]


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"a river " * 10_000)[:60]], ids=["none", "cut short"])
def test_a_broken_compressed_file_is_refused(tmp_path, content):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"a\.txt\.gz: the text can't be read"):
        read_source(path)


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.jsonl.xz"])
def test_archives_are_to_be_unpacked_first(tmp_path, name):
    (tmp_path / name).write_bytes(b"PK")
    with pytest.raises(InputError, match="unpack it first"):
        read_source(tmp_path / name)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    "wrapped",
    [
        {"data": [{"text": "one"}, {"text": "two"}]},
        {"version": "1.0", "train": [{"text": "one"}, {"text": "two"}], "test": [{"text": "three"}]},
        {"rows": [{"text": "one"}, {"text": "two"}]},
    ],
)
def test_an_object_that_wraps_the_records_is_read_as_their_list(tmp_path, wrapped, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(wrapped, indent=indent))
    assert read_source(path).documents == ["one", "two"]
    renamed = path.read_text().replace('"text"', '"body"')
    path.write_text(renamed)
    assert read_source(path, "body").documents == ["one", "two"]


def test_an_object_that_wraps_several_lists_is_refused_with_the_fix(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"first": [{"text": "one"}], "second": [{"text": "two"}]}))
    with pytest.raises(InputError, match=r"several lists of records \(first, second\); save the one to use"):
        read_source(path)


@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_record(tmp_path, indent):
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"text": "one", "tags": [{"name": "short"}]}, indent=indent))
    assert read_source(path).documents == ["one"]


def test_pretty_printed_objects_may_follow_each_other(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}, indent=2) for text in ("one", "two")))
    assert read_source(path).documents == ["one", "two"]


@pytest.mark.parametrize("content", ['{"text": ' + "9" * 5000 + "}", "[" * 100_000])
def test_json_that_python_cannot_read_is_refused(tmp_path, content):
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: (can't be read as|is not valid) JSON"):
        read_source(path)


@pytest.mark.parametrize(("name", "separator"), [("a.csv", ","), ("a.tsv", "\t"), ("A.CSV", ",")])
def test_tables_of_text_are_read_by_column(tmp_path, name, separator):
    path, rows = (
        tmp_path / name,
        [["id", "text", "body"], ["1", "one, or\n\ttwo", "x"], ["2", "", "y"], ["3", "3", "z"]],
    )
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    assert read_source(path).documents == ["one, or\n\ttwo", "", "3"]
    assert read_source(path, "body").documents == ["x", "y", "z"]
    with pytest.raises(InputError, match=rf"{name}, row 1: no field 'none'\. The fields are id, text, body; .*--field"):
        read_source(path, "none")


def test_tables_of_text_may_hold_instructions_and_very_long_texts(tmp_path):
    path, text = tmp_path / "a.csv", "river " * 100_000
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows([*ALPACA, {"instruction": "Tell.", "input": "", "output": text}])
    assert read_source(path).documents[:2] == ALPACA_DOCUMENTS
    assert read_source(path).documents[2].endswith(text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,text\n1,one\n2,two, or three\n", r"row 2: has more values than the first line has names; .*quotes"),
        ('id,text\n1,"one\n2,two\n', r"row 1: is not a row of a table .*fix its quotes"),
    ],
)
def test_broken_rows_are_named(tmp_path, content, message):
    path = tmp_path / "a.csv"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_source(path)


@pytest.mark.parametrize("name", ["data/missing.csv", "data/missing.jsonl.gz", "data/MISSING.TSV"])
def test_a_missing_table_or_compressed_file_is_not_looked_for_on_the_hub(monkeypatch, name):
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    with pytest.raises(InputError, match=f"{name}: no such file"):
        read_source(name)
