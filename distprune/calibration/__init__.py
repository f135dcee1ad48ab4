"""Calibration data: text, or the model's own samples -> packed token ids in one file."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from distprune.calibration.arrow import (
    Calibration,
    CalibrationMetadata,
    open_calibration,
    prepare_output,
    write_calibration,
)
from distprune.calibration.chat import Rendered
from distprune.calibration.expert_coverage import CANDIDATES, choose_covering
from distprune.calibration.own_samples import DEFAULT_SAMPLING, generate_own_samples
from distprune.calibration.packing import draw_windows, equal_shares, interleave
from distprune.calibration.sampling import Sampling
from distprune.calibration.text_sources import TextSource, read_source
from distprune.calibration.tokenizer import load_tokenizer, tokenizer_fingerprint
from distprune.calibration.whole_model import check_sequence_length, load_config, load_model
from distprune.errors import InputError
from distprune.hardware import AUTO

_LOGGER = logging.getLogger(__name__)

__all__ = [
    "Calibration",
    "CalibrationMetadata",
    "Sampling",
    "build_calibration",
    "draw_calibration",
    "generate_own_samples",
    "load_tokenizer",
    "open_calibration",
    "tokenizer_fingerprint",
    "write_calibration",
]


def build_calibration(
    model_path: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    field: str | None = None,
    samples: int = 128,
    sequence_length: int = 128,
    seed: int = 0,
    output: str | Path,
    device: str = "cpu",
    dtype: str | torch.dtype = AUTO,
    trust_remote_code: bool = False,
    cover_experts: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Draw a calibration set as `draw_calibration` does, write it and open it. Raises InputError."""
    output = prepare_output(output)
    tokens, metadata = draw_calibration(
        model_path,
        texts=texts,
        field=field,
        samples=samples,
        sequence_length=sequence_length,
        seed=seed,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        cover_experts=cover_experts,
        on_progress=on_progress,
    )
    write_calibration(output, tokens, metadata)
    return open_calibration(output)


def draw_calibration(
    model_path: str | Path,
    *,
    texts: Sequence[str | Path] = (),
    field: str | None = None,
    samples: int = 128,
    sequence_length: int = 128,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | torch.dtype = AUTO,
    trust_remote_code: bool = False,
    cover_experts: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[np.ndarray, CalibrationMetadata]:
    """Draw `samples` windows of `sequence_length` tokens -> int32 (samples, sequence_length), and what is said of them.

    Each of `texts` (see `sources.read_source`) gives an equal share of the windows, the first ones one more
    where it doesn't come out even; rows take the sources in turn. Without texts the model writes its own
    samples on `device` in `dtype`, and `on_progress(tokens done, tokens in all)` is called. With
    `cover_experts` a mixture of experts reads more of the texts, and windows are added for experts that the
    others seldom reach. Raises InputError.
    """
    _check_counts(samples, seed, len(texts))
    if cover_experts and not texts:
        raise InputError("--cover-experts: chooses among windows of text. Give --text.")
    config = load_config(model_path, trust_remote_code)
    check_sequence_length(sequence_length, config, model_path)
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    sources = [read_source(text, field) for text in texts]
    if sources:
        most = CANDIDATES if cover_experts else 1
        tokens = _windows_of_texts(texts, sources, tokenizer, samples, sequence_length, seed, most)
    else:
        tokens = generate_own_samples(
            model_path,
            samples,
            sequence_length,
            seed,
            device=device,
            dtype=dtype,
            on_progress=on_progress,
            trust_remote_code=trust_remote_code,
        )
    if cover_experts:
        model = load_model(model_path, device, dtype, trust_remote_code)
        tokens, coverage = choose_covering(model, tokens, samples, on_progress=on_progress)
        _LOGGER.warning("%s", coverage)
    metadata = CalibrationMetadata(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        vocab_size=config.vocab_size,
        sequence_length=sequence_length,
        sources=tuple(source.name for source in sources),
        seed=seed,
        self_generated=not sources,
        sampling=None if sources else DEFAULT_SAMPLING,
    )
    _check_vocabulary(tokens, config.vocab_size, model_path)
    return tokens, metadata


def _windows_of_texts(
    texts: Sequence[str | Path],
    sources: Sequence[TextSource],
    tokenizer: PreTrainedTokenizerBase,
    samples: int,
    length: int,
    seed: int,
    most: int,
) -> np.ndarray:
    """int32 (samples, length): equal shares of all sources, in turn; up to ``most`` times as many."""
    parts = [
        _windows_of_text(str(text), source, tokenizer, share, length, seed, most * share)
        for text, source, share in zip(texts, sources, equal_shares(samples, len(sources)), strict=True)
    ]
    return interleave(parts)


def _windows_of_text(
    name: str, source: TextSource, tokenizer: PreTrainedTokenizerBase, count: int, length: int, seed: int, most: int
) -> np.ndarray:
    """int32 (count, length), or up to ``most``. Says how many conversations the tokenizer's chat template refused."""
    documents = Rendered(source.documents, tokenizer)
    try:
        windows = draw_windows(
            documents, tokenizer, count, length, seed, from_start=source.from_start, name=name, most=most
        )
    except InputError as error:
        if not documents.refused:
            raise
        raise InputError(f"{error} The chat template refused {documents.refusals()}") from error
    if documents.refused:
        _LOGGER.warning("%s: the chat template refused %s They were left out.", name, documents.refusals())
    return windows


def _check_counts(samples: int, seed: int, texts: int) -> None:
    if samples < 1:
        raise InputError(f"--samples {samples}: at least 1 is needed.")
    if samples < texts:
        raise InputError(f"--samples {samples}: fewer than the {texts} texts; each has to give at least one.")
    if seed < 0:
        raise InputError(f"--seed {seed}: must not be negative.")


def _check_vocabulary(tokens: np.ndarray, vocab_size: int, model_path: str | Path) -> None:
    if tokens.max() >= vocab_size:
        raise InputError(
            f"{model_path}: its tokenizer gives the token id {tokens.max()}, outside the model's vocabulary of "
            f"{vocab_size}; tokenizer and model don't belong together."
        )
