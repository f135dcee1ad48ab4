"""Documents -> windows of token ids, all of one length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
from transformers import PreTrainedTokenizerBase

from distprune.calibration.tokenizer import tokenize
from distprune.errors import InputError

_DOCUMENTS_AT_ONCE = 64


def draw_windows(
    documents: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    count: int,
    sequence_length: int,
    seed: int,
    *,
    from_start: bool = False,
    name: str = "the text",
    most: int | None = None,
) -> np.ndarray:
    """Draw `count` windows of `sequence_length` token ids -> int32 (count, sequence_length).

    Each document that is long enough is cut into windows that don't overlap, on a grid shifted at random.
    Documents come in random order, without replacement, and give one window each, drawn at random; only
    when they run out do they give a second one each, then a third. So many short records give as many
    different texts as can be had, and one long text gives windows from all over it.

    `from_start`: documents are cut from their start and give their windows in order, as instructions need.
    No special tokens are added. The draw depends on the seed alone. Documents are tokenized only until
    there are enough. With `most`, so many are drawn where the documents hold them. Raises InputError, under `name`,
    when the documents hold fewer than `count` windows.
    """
    most = most or count
    long_documents = _cut_long_documents(documents, tokenizer, sequence_length, seed, from_start)
    cut = list(islice(long_documents, most))
    windows = list(islice(_rounds(cut), most))
    if len(windows) < count:
        raise InputError(
            f"{name}: holds only {len(windows)} windows of {sequence_length} tokens, and {count} were asked for. "
            "Ask for fewer --samples, use a shorter --sequence-length or add text."
        )
    return np.stack(windows)


def interleave(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Rows of several sources, one of each in turn, so that any first rows are a fair sample of all."""
    longest = max(len(part) for part in parts)
    return np.stack([part[row] for row in range(longest) for part in parts if row < len(part)])


def equal_shares(total: int, parts: int) -> list[int]:
    """Split `total` into `parts` numbers that differ by one at most, the larger ones first."""
    share, remainder = divmod(total, parts)
    return [share + (part < remainder) for part in range(parts)]


def _cut_long_documents(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, length: int, seed: int, from_start: bool
) -> Iterator[np.ndarray]:
    """The windows (n, length), n >= 1, of each long enough document, the documents in random order."""
    order = np.random.default_rng(seed).permutation(len(documents))
    for first in range(0, len(order), _DOCUMENTS_AT_ONCE):
        chosen = order[first : first + _DOCUMENTS_AT_ONCE].tolist()
        tokenized = tokenize(tokenizer, [documents[index] for index in chosen])
        for index, ids in zip(chosen, tokenized, strict=True):
            if len(ids) >= length:
                yield _cut_in_order(ids, length) if from_start else _cut_at_random(ids, length, (seed, index))


def _cut_in_order(ids: np.ndarray, length: int) -> np.ndarray:
    return ids[: len(ids) // length * length].reshape(-1, length)


def _cut_at_random(ids: np.ndarray, length: int, seed: tuple[int, int]) -> np.ndarray:
    random = np.random.default_rng(seed)
    shift = random.integers(len(ids) % length + 1)
    return random.permutation(_cut_in_order(ids[shift:], length))


def _rounds(cut: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """First windows of all documents, then second ones, and so on."""
    for turn in range(max(map(len, cut), default=0)):
        yield from (windows[turn] for windows in cut if turn < len(windows))
