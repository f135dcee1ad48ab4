from __future__ import annotations

import dataclasses
import json
import os

import numpy as np
import pyarrow as pa
import pytest

from distprune.calibration.arrow import CalibrationMetadata, open_calibration, write_calibration
from distprune.calibration.sampling import Sampling
from distprune.errors import InputError

METADATA = CalibrationMetadata(
    tokenizer_fingerprint="ab" * 32,
    vocab_size=100,
    sequence_length=8,
    sources=("a.txt", "b.jsonl"),
    seed=5,
    self_generated=False,
)


@pytest.fixture
def tokens():
    return np.random.default_rng(0).integers(100, size=(6, 8), dtype=np.int32)


@pytest.fixture
def written(tmp_path, tokens):
    path = tmp_path / "calib.arrow"
    write_calibration(path, tokens, METADATA)
    return path


def rewrite(path, change):
    """Write the file again after `change(table) -> table`."""
    table = change(pa.ipc.open_file(str(path)).read_all())
    with pa.ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def test_tokens_and_metadata_come_back(written, tokens):
    calibration = open_calibration(written)
    assert np.array_equal(calibration.tokens, tokens)
    assert calibration.tokens.dtype == np.int32
    assert calibration.metadata == METADATA
    assert calibration.path == written


def test_how_own_samples_were_drawn_comes_back(tmp_path, tokens):
    metadata = dataclasses.replace(METADATA, self_generated=True, sources=(), sampling=Sampling(0.5, 7))
    write_calibration(tmp_path / "own.arrow", tokens, metadata)
    assert open_calibration(tmp_path / "own.arrow").metadata == metadata


def test_a_file_that_does_not_say_how_its_samples_were_drawn_opens(written):
    def without_sampling(table):
        ((key, value),) = table.schema.metadata.items()
        fields = json.loads(value)
        del fields["sampling"]
        return table.replace_schema_metadata({key: json.dumps(fields)})

    rewrite(written, without_sampling)
    assert open_calibration(written).metadata == METADATA


def test_each_row_is_one_fixed_size_list_that_any_arrow_reader_understands(written, tokens):
    table = pa.ipc.open_file(str(written)).read_all()
    assert table.schema.field(0).type.list_size == 8
    assert table.column(0).to_pylist() == tokens.tolist()


def test_tokens_are_mapped_from_the_file_and_not_copied(tmp_path):
    path = tmp_path / "calib.arrow"
    write_calibration(path, np.zeros((100_000, 8), dtype=np.int32), METADATA)
    before = pa.total_allocated_bytes()
    calibration = open_calibration(path)
    assert pa.total_allocated_bytes() - before < 100_000
    assert not calibration.tokens.flags.owndata
    assert not calibration.tokens.flags.writeable


def test_the_same_input_gives_the_same_bytes(tmp_path, tokens, written):
    write_calibration(tmp_path / "again.arrow", tokens.copy(), METADATA)
    assert (tmp_path / "again.arrow").read_bytes() == written.read_bytes()


def test_missing_folders_are_made_and_no_temporary_file_stays(tmp_path, tokens):
    path = tmp_path / "new" / "deep" / "calib.arrow"
    write_calibration(path, tokens, METADATA)
    assert os.listdir(path.parent) == ["calib.arrow"]


def test_a_failed_write_leaves_the_old_file_and_no_rest(written, tokens, monkeypatch):
    before = written.read_bytes()

    def full_disk(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(InputError, match=r"calib\.arrow: can't be written \(No space left on device\)"):
        write_calibration(written, tokens + 1, METADATA)
    assert written.read_bytes() == before
    assert os.listdir(written.parent) == ["calib.arrow"]


def test_a_directory_as_output_is_refused(tmp_path, tokens):
    with pytest.raises(InputError, match="is a directory"):
        write_calibration(tmp_path, tokens, METADATA)


def test_an_output_below_a_file_is_refused(written, tokens):
    with pytest.raises(InputError, match="can't be made a directory"):
        write_calibration(written / "sub" / "calib.arrow", tokens, METADATA)


def test_the_fingerprint_depends_on_tokens_and_length_alone(tmp_path, tokens, written):
    fingerprint = open_calibration(written).fingerprint
    other = tmp_path / "other.arrow"
    write_calibration(other, tokens, dataclasses.replace(METADATA, seed=6, sources=("c.txt",)))
    assert open_calibration(other).fingerprint == fingerprint
    changed = tokens.copy()
    changed[3, 4] += 1
    write_calibration(other, changed, METADATA)
    assert open_calibration(other).fingerprint != fingerprint
    write_calibration(other, tokens.reshape(12, 4), dataclasses.replace(METADATA, sequence_length=4))
    assert open_calibration(other).fingerprint != fingerprint


def test_a_set_matches_its_own_tokenizer(written):
    open_calibration(written).check_matches(METADATA.tokenizer_fingerprint, 100, "the-model")


def test_a_set_of_another_tokenizer_is_refused_with_the_mend(written):
    with pytest.raises(InputError, match=r"calib\.arrow: .*another tokenizer.*`distprune calibrate the-model` again"):
        open_calibration(written).check_matches("cd" * 32, 100, "the-model")


@pytest.mark.parametrize("wrong", [90, -1])
def test_an_id_outside_the_vocabulary_is_named_with_its_row(tmp_path, tokens, wrong):
    tokens = tokens % 90
    tokens[4, 2] = wrong
    path = tmp_path / "calib.arrow"
    write_calibration(path, tokens, METADATA)
    with pytest.raises(InputError, match=rf"row 4 holds the token id {wrong}, outside .*the-model \(90 tokens\)"):
        open_calibration(path).check_matches(METADATA.tokenizer_fingerprint, 90, "the-model")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.arrow: no such calibration set"):
        open_calibration(tmp_path / "none.arrow")


@pytest.mark.parametrize("content", [b"", b"ARROW", b"just some text, longer than a magic number"])
def test_a_file_that_is_not_arrow_is_refused(tmp_path, content):
    path = tmp_path / "calib.arrow"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"calib\.arrow: is not a whole Arrow file"):
        open_calibration(path)


def test_a_directory_as_input_is_refused(tmp_path):
    with pytest.raises(InputError, match="is not a whole Arrow file"):
        open_calibration(tmp_path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_refused(written, share):
    content = written.read_bytes()
    written.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(InputError, match="is not a whole Arrow file"):
        open_calibration(written)


def test_an_arrow_file_of_something_else_is_refused(written):
    rewrite(written, lambda table: pa.table({"text": ["a", "b"]}))
    with pytest.raises(InputError, match="not a calibration set"):
        open_calibration(written)


def test_another_layout_is_refused(written):
    def widen(table):
        wide = pa.array(table.column(0).to_pylist(), type=pa.list_(pa.int64()))
        return pa.table({"input_ids": wide}).replace_schema_metadata(table.schema.metadata)

    rewrite(written, widen)
    with pytest.raises(InputError, match="another layout"):
        open_calibration(written)


def test_another_format_version_is_refused(written):
    def age(table):
        ((key, value),) = table.schema.metadata.items()
        return table.replace_schema_metadata({key: value.replace(b'"format_version": 1', b'"format_version": 99')})

    rewrite(written, age)
    with pytest.raises(InputError, match="format version 99"):
        open_calibration(written)


def test_a_set_without_rows_is_refused(written):
    schema = pa.ipc.open_file(str(written)).schema
    with pa.ipc.new_file(str(written), schema) as writer:
        writer.write_batch(pa.record_batch([pa.array([], type=schema.field(0).type)], schema=schema))
    with pytest.raises(InputError, match="holds no rows"):
        open_calibration(written)


def test_only_a_calibration_set_is_replaced(tmp_path, tokens):
    path = tmp_path / "text.arrow"
    for seed in (0, 1):
        write_calibration(path, tokens, dataclasses.replace(METADATA, seed=seed))
    assert open_calibration(path).metadata.seed == 1
    path.write_text("The river runs down to the sea.")
    with pytest.raises(InputError, match=r"text\.arrow: exists and is no calibration set.*choose another --output"):
        write_calibration(path, tokens, METADATA)
    assert path.read_text() == "The river runs down to the sea."
