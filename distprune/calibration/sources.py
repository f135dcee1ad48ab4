"""What the user names as text (a file or a Hugging Face dataset) -> documents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distprune.calibration.records import document, document_fields, is_instruction
from distprune.errors import InputError

_JSON = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class TextSource:
    """The documents of one source.

    `name` is what the calibration set records. `from_start`: a window should open where its document does,
    as for instructions, instead of at a random place.
    """

    name: str
    documents: list[str]
    from_start: bool = False


def read_source(source: str | Path, field: str | None = None) -> TextSource:
    """Read a text source.

    A plain text file is one long document; each line of a JSONL file (or element of a JSON array), row of a
    Parquet file or row of a dataset is a document of its own. Which field of a record holds it:
    `records.document_fields`. A dataset is written NAME, NAME:CONFIG or NAME:CONFIG:SPLIT, the split being
    "train" unless given. Raises InputError when there is no such source, or no text in it.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{source}: is a directory; name the text files in it one by one.")
    if not path.exists():
        found = _from_records(str(source), _dataset_records(str(source), field), field)
    elif path.suffix.lower() in _JSON:
        found = _from_records(path.name, _json_records(path), field)
    elif path.suffix.lower() in _PARQUET:
        found = _from_records(path.name, _parquet_records(path, field), field)
    else:
        found = TextSource(path.name, [read_text(path)])
    if not any(text.strip() for text in found.documents):
        raise InputError(f"{source}: holds no text.")
    return found


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file. Raises InputError when it is missing or not such a file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{path}: the text can't be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it first.") from error


def _from_records(name: str, records: Iterable[tuple[str, Mapping]], field: str | None) -> TextSource:
    documents, from_start = [], False
    for where, record in records:
        fields = document_fields(record, field, where)
        from_start |= is_instruction(fields)
        documents.append(document(record, fields, where))
    return TextSource(name, documents, from_start)


def _json_records(path: Path) -> Iterator[tuple[str, Mapping]]:
    """The objects of a JSON array, or of one JSON value a line, each with its place for error messages."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        elements = ((f"{path}, element {n}", element) for n, element in enumerate(_parsed(text, str(path)), 1))
    else:
        # Only "\n" ends a line: str.splitlines would also split at separators that JSON strings may hold.
        lines = ((f"{path}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
        elements = ((where, _parsed(line, where)) for where, line in lines)
    for where, element in elements:
        if not isinstance(element, dict):
            raise InputError(f"{where}: holds {type(element).__name__}, where a JSON object with fields is needed.")
        yield where, element


def _parsed(text: str, where: str):
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: is not valid JSON ({error.msg} at {place}); mend or delete it.") from error


def _parquet_records(path: Path, field: str | None) -> Iterator[tuple[str, Mapping]]:
    try:
        columns = document_fields(pq.read_schema(path).names, field, str(path))
        table = pq.read_table(path, columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not a readable Parquet file ({error}).") from error
    return _rows(table, str(path))


def _rows(table: pa.Table, name: str) -> Iterator[tuple[str, Mapping]]:
    return ((f"{name}, row {number}", row) for number, row in enumerate(table.to_pylist(), 1))


def _dataset_records(source: str, field: str | None) -> Iterator[tuple[str, Mapping]]:
    _refuse_missing_file(source)
    name, config, split = (*source.split(":", 2), "", "")[:3]
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{source}: no such file; to read it as a Hugging Face dataset, install the package 'datasets'."
        ) from error
    try:
        dataset = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # the hub client, the file readers and the network each raise their own kinds
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"{source}: no such file, and no Hugging Face dataset of that name could be loaded ({reason})."
        ) from error
    columns = document_fields(dataset.column_names, field, source)
    return _rows(dataset.select_columns(list(columns)).with_format("arrow")[:], source)


def _refuse_missing_file(source: str) -> None:
    """Say at once that a file is missing, in place of asking the hub for a dataset of that name."""
    path = Path(source)
    looks_like_file = path.suffix.lower() in (".txt", ".text", ".md", *_JSON, *_PARQUET)
    if looks_like_file or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file.")
