"""The calibration set on disk: an Arrow IPC file with one fixed-size list of int32 token ids a row.

The driver maps the file into memory; workers are sent the tokens, which are small.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.ipc
from upath import UPath

from distprune.calibration.sampling import Sampling
from distprune.errors import InputError
from distprune.storage import is_remote, kept_locally, local_copy, location

FORMAT_VERSION = 1
_KEY = b"distprune.calibration"
_COLUMN = "input_ids"
_MEND = "make it anew with `distprune calibrate`"


@dataclass(frozen=True)
class CalibrationMetadata:
    """Where the tokens come from.

    `sources` is empty when they are the model's own samples; `sampling` says how those were drawn (None in files that
    do not record it).
    """

    tokenizer_fingerprint: str
    vocab_size: int
    sequence_length: int
    sources: tuple[str, ...]
    seed: int
    self_generated: bool
    sampling: Sampling | None = None


@dataclass(frozen=True)
class Calibration:
    """An open calibration set. `tokens`: int32 (rows, sequence_length), read-only and mapped from the file."""

    path: Path
    tokens: np.ndarray
    metadata: CalibrationMetadata

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the tokens and the sequence length: what a pruned model can depend on."""
        digest = hashlib.sha256(str(self.tokens.shape[1]).encode() + b"\n")
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4"))
        return digest.hexdigest()

    def check_matches(self, tokenizer_fingerprint: str, vocab_size: int, source_name: str) -> None:
        """Raise InputError unless the set was made for this model.

        `source_name` is what the error calls the model; `vocab_size` the rows of its embedding.
        """
        if tokenizer_fingerprint != self.metadata.tokenizer_fingerprint:
            raise InputError(
                f"{self.path}: was made with another tokenizer than that of {source_name}; "
                f"run `distprune calibrate {source_name}` again."
            )
        outside = (self.tokens < 0) | (self.tokens >= vocab_size)
        if outside.any():
            row, column = np.argwhere(outside)[0].tolist()
            raise InputError(
                f"{self.path}: row {row} holds the token id {self.tokens[row, column]}, outside the vocabulary of "
                f"{source_name} ({vocab_size} tokens); run `distprune calibrate {source_name}` again."
            )


def prepare_output(path: str | Path | UPath) -> Path | UPath:
    """Make the folder of a file to be written.

    Raises InputError when the file couldn't be put there, or would replace what is no calibration set: a text, say.
    """
    path = location(path)
    if is_remote(path):
        if path.exists() and not _is_calibration(path):
            raise InputError(f"{path}: exists and is no calibration set, so it is not replaced; choose another one.")
        return path
    if path.is_dir():
        raise InputError(f"{path}: is a directory; give the name of a file to write.")
    if path.exists() and path.stat().st_size and not _is_calibration(path):
        raise InputError(f"{path}: exists and is no calibration set, so it is not replaced; choose another --output.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent}: can't be made a directory ({error.strerror}).") from error
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path.parent}: is not writable; choose another --output.")
    return path


def write_calibration(path: str | Path, tokens: np.ndarray, metadata: CalibrationMetadata) -> None:
    """Write int32 tokens (rows, sequence_length) so that the file appears whole or not at all.

    The same tokens and metadata give the same bytes. Raises InputError when the place can't be written.
    """
    path = prepare_output(path)
    rows, length = tokens.shape
    if not rows or length != metadata.sequence_length or tokens.dtype != np.int32:
        raise ValueError(f"tokens {tokens.dtype} {tokens.shape} don't fit windows of {metadata.sequence_length} int32")
    schema = _schema(length).with_metadata({_KEY: _encoded(metadata)})
    column = pa.FixedSizeListArray.from_arrays(pa.array(tokens.reshape(-1)), type=schema.field(_COLUMN).type)
    with kept_locally(path) as local:
        _write_whole(local, schema, column)


def _write_whole(path: Path, schema: pa.Schema, column: pa.Array) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            with pa.ipc.new_file(file, schema) as writer:
                writer.write_batch(pa.record_batch([column], schema=schema))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: can't be written ({error.strerror or error}).") from error
    finally:
        temporary.unlink(missing_ok=True)
    _sync_directory(path.parent)


def open_calibration(path: str | Path) -> Calibration:
    """Map a calibration set into memory; nothing is read but the footer.

    Raises InputError when the file is missing, cut short, empty or not a calibration set.
    """
    path = location(path)
    try:
        reader = pa.ipc.open_file(pa.memory_map(os.fsencode(local_copy(path))))
        metadata = _decoded(path, reader.schema)
        if not reader.schema.equals(_schema(metadata.sequence_length)) or reader.num_record_batches != 1:
            raise InputError(f"{path}: has another layout than a calibration set; {_MEND}.")
        column = reader.get_batch(0).column(0)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such calibration set; make it with `distprune calibrate`.") from error
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{path}: is not a whole Arrow file ({error}); {_MEND}.") from error
    if not len(column):
        raise InputError(f"{path}: holds no rows; {_MEND}.")
    tokens = column.flatten().to_numpy(zero_copy_only=True).reshape(len(column), metadata.sequence_length)
    return Calibration(path, tokens, metadata)


def _is_calibration(path: Path) -> bool:
    try:
        open_calibration(path)
    except InputError:
        return False
    return True


def _schema(sequence_length: int) -> pa.Schema:
    ids = pa.list_(pa.field("item", pa.int32(), nullable=False), sequence_length)
    return pa.schema([pa.field(_COLUMN, ids, nullable=False)])


def _encoded(metadata: CalibrationMetadata) -> bytes:
    return json.dumps({"format_version": FORMAT_VERSION, **asdict(metadata)}, sort_keys=True).encode()


def _decoded(path: Path, schema: pa.Schema) -> CalibrationMetadata:
    try:
        fields = json.loads((schema.metadata or {})[_KEY])
        version = fields.pop("format_version")
        if version != FORMAT_VERSION:
            raise InputError(f"{path}: has format version {version}, this distprune reads {FORMAT_VERSION}; {_MEND}.")
        sampling = fields.pop("sampling", None)
        return CalibrationMetadata(
            **{**fields, "sources": tuple(fields["sources"])}, sampling=Sampling(**sampling) if sampling else None
        )
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: is an Arrow file, but not a calibration set; {_MEND}.") from error


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
