"""What the user names as text (a file or a Hugging Face dataset) -> documents."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from distprune.calibration.chat import Conversation
from distprune.calibration.records import document, document_fields, is_instruction
from distprune.calibration.unicode import without_surrogates
from distprune.errors import InputError
from distprune.storage import is_url, local_copy, location

_LOGGER = logging.getLogger(__name__)
_JSON = (".jsonl", ".json", ".ndjson")
_PARQUET = (".parquet", ".pq")
_SEPARATORS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
_PROSE = (".txt", ".text", ".md")
# Those that pyarrow unpacks while it reads, and those to be unpacked by hand.
_COMPRESSED = (".gz", ".bz2", ".zst", ".lz4")
_PACKED = (".zip", ".tar", ".tgz", ".xz", ".7z", ".rar")
# Objects that hold the records of a data set in one of these are read as that list.
_WRAPPERS = ("train", "data")
_DECODER, _SPACE = json.JSONDecoder(), re.compile(r"\s*")
_LONGEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class TextSource:
    """The documents of one source: texts, and conversations that a chat template is to write out.

    `name` is what the calibration set records. `from_start`: a window should open where its document does,
    as for instructions and conversations, instead of at a random place.
    """

    name: str
    documents: list[str | Conversation]
    from_start: bool = False


def read_source(source: str | Path, field: str | None = None) -> TextSource:
    """Read a text source.

    A plain text file is one long document; each object of a JSON or JSONL file, row of a CSV, TSV or Parquet file or
    row of a dataset is a document of its own. Which field of a record holds it: `records.document_fields`. Files may be
    compressed. A dataset is written NAME, NAME:CONFIG or NAME:CONFIG:SPLIT, the
    split being "train" unless given. Raises InputError when there is no such source, or no text in it.
    """
    if is_url(source):
        source = fetched(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise InputError(f"{source}: is a directory; name the text files in it one by one.")
    kind = _kind(path)
    if not path.exists():
        found = _from_records(str(source), _dataset_records(str(source), field), field)
    elif kind in _JSON:
        found = _from_records(path.name, _json_records(path, field), field)
    elif kind in _SEPARATORS:
        found = _from_records(path.name, _separated_records(path, _SEPARATORS[kind]), field)
    elif kind in _PARQUET:
        found = _from_records(path.name, _parquet_records(path, field), field)
    else:
        found = TextSource(path.name, [read_text(path)])
    if not any(text.strip() if isinstance(text, str) else text.messages for text in found.documents):
        raise InputError(f"{source}: holds no text.")
    return found


def fetched(url: str | Path) -> Path:
    """A copy of a file in an object store. Raises InputError when there is none."""
    try:
        return local_copy(location(url))
    except FileNotFoundError as error:
        raise InputError(f"{url}: no such file.") from error


def read_text(path: str | Path) -> str:
    """The whole of a UTF-8 text file, which may be compressed. Raises InputError when it is missing or no such file."""
    path = fetched(path) if is_url(path) else Path(path)
    content = _content(path)
    try:
        # Surrogates too are encoded by some programs.
        text = content.decode("utf-8", "surrogatepass").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text (byte {error.start}); convert it first.") from error
    if (whole := without_surrogates(text)) is not text:
        _LOGGER.warning("%s: holds lone surrogates, which are read as U+FFFD.", path)
    # As files opened as text are read.
    return whole.replace("\r\n", "\n").replace("\r", "\n")


def _content(path: Path) -> bytes:
    """The bytes of a file, unpacked if it is compressed. Raises InputError when it can't be read."""
    ending = path.suffix.lower()
    if _kind(path) in _PACKED:
        raise InputError(f"{path}: is packed; unpack it first.")
    try:
        if ending not in _COMPRESSED:
            return path.read_bytes()
        with path.open("rb") as file, pa.input_stream(file, compression=_codec(ending)) as stream:
            return stream.read()
    except (OSError, pa.ArrowException) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: the text can't be read ({reason}).") from error


def _codec(ending: str) -> str:
    return pa.Codec.detect(f"file{ending}").name


def _kind(path: Path) -> str:
    """The file's ending, in small letters; of a compressed one, that of what is in it."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings and endings[-1] in _COMPRESSED:
        endings.pop()
    return endings[-1] if endings else ""


def _from_records(name: str, records: Iterable[tuple[str, Mapping]], field: str | None) -> TextSource:
    documents, from_start, replaced = [], False, 0
    for where, record in records:
        fields = document_fields(record, field, where)
        chosen = {name: record[name] for name in fields}
        whole = without_surrogates(chosen)
        replaced += whole != chosen
        documents.append(document(whole, fields, where))
        from_start |= is_instruction(fields) or isinstance(documents[-1], Conversation)
    if replaced:
        _LOGGER.warning("%s: %d of its records hold lone surrogates, which are read as U+FFFD.", name, replaced)
    return TextSource(name, documents, from_start)


def _json_records(path: Path, field: str | None) -> Iterator[tuple[str, Mapping]]:
    """The objects of a JSON file, each with its place for error messages.

    They are those of an array, which may stand in an object of its own, or one after another, on a line each or not.
    """
    found = list(_json_values(read_text(path), str(path)))
    if len(found) == 1:
        found = _elements(*found[0], field) or found
    for where, element in found:
        if not isinstance(element, dict):
            raise InputError(f"{where}: holds {type(element).__name__}, where a JSON object with fields is needed.")
        yield where, element


def _json_values(text: str, where: str) -> Iterator[tuple[str, object]]:
    """JSON values one after another; by lines, if the first line is one, so that a broken line is named as such."""
    # Only "\n" ends a line: str.splitlines would also split at separators that JSON strings may hold.
    lines = [(f"{where}, line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if lines and (len(lines) == 1 or _is_json(lines[0][1])):
        yield from ((place, _parsed(line, place)) for place, line in lines)
        return
    start, number = _skip_space(text, 0), 0
    while start < len(text):
        value, end = _first_value(text, start, where)
        start, number = _skip_space(text, end), number + 1
        yield (where if number == 1 and start == len(text) else f"{where}, object {number}"), value


def _skip_space(text: str, start: int) -> int:
    return _SPACE.match(text, start).end()


def _elements(where: str, value: object, field: str | None) -> list[tuple[str, object]] | None:
    """The records in the only value of a file, if it is no record itself: an array, or an object that wraps one.

    Raises InputError when an object wraps several arrays, none of which is the obvious one.
    """
    if isinstance(value, dict):
        value = _wrapped(where, value, field)
    if not isinstance(value, list):
        return None
    path = where.removesuffix(", line 1")
    return [(f"{path}, element {number}", element) for number, element in enumerate(value, 1)]


def _wrapped(where: str, value: dict, field: str | None) -> object:
    """The list of records that an object wraps; the object itself where it is a record, or wraps none."""
    try:
        document_fields(value, field, where)
        return value
    except InputError:
        lists = {name: held for name, held in value.items() if _holds_records(held)}
    chosen = next((name for name in _WRAPPERS if name in lists), None)
    if chosen is None and len(lists) > 1:
        raise InputError(
            f"{where}: holds several lists of records ({', '.join(lists)}); save the one to use in a file of its own."
        )
    return lists[chosen] if chosen else next(iter(lists.values()), value)


def _holds_records(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, dict) for element in value)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(text: str, where: str) -> object:
    value, end = _first_value(text, _skip_space(text, 0), where)
    if (rest := _skip_space(text, end)) < len(text):
        raise InputError(f"{where}: is not valid JSON (Extra data at column {rest + 1}); fix or delete it.")
    return value


def _first_value(text: str, start: int, where: str) -> tuple[object, int]:
    """The JSON value that begins there, and where it ends."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if "\n" not in text else f"line {error.lineno}, column {error.colno}"
        raise InputError(f"{where}: is not valid JSON ({error.msg} at {place}); fix or delete it.") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, or deep nesting
        raise InputError(f"{where}: can't be read as JSON ({error}); fix or delete it.") from error


def _separated_records(path: Path, separator: str) -> Iterator[tuple[str, Mapping]]:
    """The rows of a table as text, under the names in its first line."""
    csv.field_size_limit(_LONGEST_FIELD)
    rows, number = csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter=separator, strict=True), 0
    try:
        for number, row in enumerate(rows, 1):
            if None in row:
                raise InputError(
                    f"{path}, row {number}: has more values than the first line has names; put texts that hold the "
                    "separator in double quotes."
                )
            yield f"{path}, row {number}", row
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: is not a row of a table ({error}); fix its quotes.") from error


def _parquet_records(path: Path, field: str | None) -> Iterator[tuple[str, Mapping]]:
    try:
        plain = path.suffix.lower() in _PARQUET
        file = pq.ParquetFile(pa.memory_map(os.fsencode(path)) if plain else pa.BufferReader(_content(path)))
        columns = document_fields(file.schema_arrow.names, field, str(path))
        table = file.read(columns=list(columns))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not a readable Parquet file ({error}).") from error
    return _rows(table, str(path))


def _rows(table: pa.Table, name: str) -> Iterator[tuple[str, Mapping]]:
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: holds text that is not UTF-8 ({error.reason}); convert it first.") from error
    return ((f"{name}, row {number}", row) for number, row in enumerate(rows, 1))


def _dataset_records(source: str, field: str | None) -> Iterator[tuple[str, Mapping]]:
    refuse_missing_file(source)
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


def refuse_missing_file(source: str) -> None:
    """Say at once that a file is missing, in place of asking the hub for a dataset of that name."""
    path = Path(source)
    endings = (*_PROSE, *_JSON, *_PARQUET, *_SEPARATORS, *_PACKED)
    looks_like_file = _kind(path) in endings or path.suffix.lower() in _COMPRESSED
    if looks_like_file or source.startswith((".", "/", "~")):
        raise InputError(f"{source}: no such file.")
