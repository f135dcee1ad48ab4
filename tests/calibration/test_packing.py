from __future__ import annotations

import logging
import random

import numpy as np
import pytest

from distprune.calibration import load_tokenizer
from distprune.calibration.packing import draw_windows, equal_shares, interleave
from distprune.errors import InputError


def words(count: int, seed: int) -> str:
    chooser = random.Random(seed)
    return " ".join("".join(chooser.choices("abcdefghij", k=4)) for _ in range(count))


def ids_of(tokenizer, text: str) -> list[int]:
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def places(window, ids) -> list[int]:
    """Where in `ids` the window occurs."""
    window = list(window)
    return [start for start in range(len(ids) - len(window) + 1) if ids[start : start + len(window)] == window]


def origin(window, documents_ids) -> int:
    """Which document a window was cut from."""
    found = [number for number, ids in enumerate(documents_ids) if places(window, ids)]
    assert len(found) == 1
    return found[0]


class CountingTokenizer:
    def __init__(self, tokenizer):
        self.tokenizer, self.documents = tokenizer, 0

    def __call__(self, texts, **options):
        self.documents += len(texts)
        return self.tokenizer(texts, **options)


def test_windows_of_one_long_text_do_not_overlap(tokenizer):
    text = words(300, 0)
    ids = ids_of(tokenizer, text)
    length = 16
    windows = draw_windows([text], tokenizer, 40, length, seed=3)
    assert windows.shape == (40, length)
    assert windows.dtype == np.int32
    starts = sorted(place for window in windows for place in places(window, ids))
    assert len(starts) == 40
    assert min(np.diff(starts)) >= length
    # Drawn from all over the text, not from its beginning.
    assert starts[-1] > len(ids) // 2


def test_one_long_text_gives_every_window_that_fits(tokenizer):
    text = words(100, 1)
    fits = len(ids_of(tokenizer, text)) // 16
    assert len(draw_windows([text], tokenizer, fits, 16, seed=0)) == fits
    with pytest.raises(InputError, match=rf"corpus\.txt: holds only {fits} windows of 16 tokens, and {fits + 1} .*"):
        draw_windows([text], tokenizer, fits + 1, 16, seed=0, name="corpus.txt")


def test_too_little_text_says_the_mend(tokenizer):
    with pytest.raises(InputError, match=r"holds only 0 windows .*--samples.*--sequence-length"):
        draw_windows(["too short"], tokenizer, 1, 64, seed=0)


def test_records_give_one_window_each_before_any_gives_two(tokenizer):
    documents = [words(40 + number, number) for number in range(6)]
    all_ids = [ids_of(tokenizer, document) for document in documents]
    windows = draw_windows(documents, tokenizer, 6, 16, seed=0)
    assert sorted(origin(window, all_ids) for window in windows) == list(range(6))


def test_records_give_further_windows_when_there_are_too_few_of_them(tokenizer):
    documents = [words(40, 0), words(40, 1), "short"]
    all_ids = [ids_of(tokenizer, document) for document in documents]
    windows = draw_windows(documents, tokenizer, 6, 16, seed=0)
    starts = {0: [], 1: []}
    for window in windows:
        number = origin(window, all_ids)
        starts[number] += places(window, all_ids[number])
    assert [len(found) for found in starts.values()] == [3, 3]
    assert all(min(np.diff(sorted(found))) >= 16 for found in starts.values())


def test_windows_of_records_start_at_random_places(tokenizer):
    documents = [words(60, number) for number in range(20)]
    all_ids = [ids_of(tokenizer, document) for document in documents]
    starts = []
    for window in draw_windows(documents, tokenizer, 20, 16, seed=0):
        starts += places(window, all_ids[origin(window, all_ids)])
    # Neither at the start of every document, nor on one grid for all of them.
    assert len({start % 16 for start in starts}) > 5
    assert max(starts) > 100


def test_windows_from_the_start_open_where_their_document_does(tokenizer):
    documents = [words(60, number) for number in range(20)]
    openings = {tuple(ids_of(tokenizer, document)[:16]) for document in documents}
    windows = draw_windows(documents, tokenizer, 20, 16, seed=0, from_start=True)
    assert {tuple(window) for window in windows.tolist()} == openings


def test_documents_come_in_random_order(tokenizer):
    documents = [words(20, number) for number in range(50)]
    all_ids = [ids_of(tokenizer, document) for document in documents]
    chosen = [origin(window, all_ids) for window in draw_windows(documents, tokenizer, 10, 16, seed=0)]
    assert chosen != sorted(chosen)
    assert max(chosen) >= 10


def test_only_as_many_documents_are_tokenized_as_needed(tokenizer):
    documents = [words(20, number) for number in range(500)]
    counting = CountingTokenizer(tokenizer)
    draw_windows(documents, counting, 10, 16, seed=0)
    assert counting.documents < 100


def test_the_seed_alone_decides_the_draw(tokenizer):
    documents = [words(40, number) for number in range(30)]
    first = draw_windows(documents, tokenizer, 10, 16, seed=0)
    np.random.seed(7)
    assert np.array_equal(first, draw_windows(documents, tokenizer, 10, 16, seed=0))
    assert not np.array_equal(first, draw_windows(documents, tokenizer, 10, 16, seed=1))


def test_a_text_longer_than_the_models_context_is_read_whole_and_without_a_warning(model_path, caplog):
    tokenizer = load_tokenizer(model_path)  # a fresh one, for each warns but once
    assert tokenizer.model_max_length < 64
    transformers_log = logging.getLogger("transformers")
    propagate, transformers_log.propagate = transformers_log.propagate, True
    try:
        windows = draw_windows([words(200, 0)], tokenizer, 5, 64, seed=0)
    finally:
        transformers_log.propagate = propagate
    assert windows.shape == (5, 64)
    assert not caplog.records


def test_no_special_tokens_are_added(tokenizer):
    windows = draw_windows([words(200, 0)], tokenizer, 5, 64, seed=0)
    assert not np.isin(windows, tokenizer.all_special_ids).any()


def test_shares_are_equal_with_the_remainder_first():
    assert equal_shares(8, 3) == [3, 3, 2]
    assert equal_shares(4, 2) == [2, 2]


def test_interleaved_rows_take_the_sources_in_turn():
    parts = [np.array([[1], [2], [3]]), np.array([[10], [20]]), np.array([[100], [200]])]
    assert interleave(parts).ravel().tolist() == [1, 10, 100, 2, 20, 200, 3]
