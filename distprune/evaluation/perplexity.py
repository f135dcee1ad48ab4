"""Perplexity of a model on a text, in windows that don't overlap."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from distprune.calibration.text_sources import TextSource, read_source
from distprune.calibration.tokenizer import load_tokenizer, tokenize
from distprune.calibration.whole_model import check_sequence_length, input_device, load_config, load_model
from distprune.errors import InputError
from distprune.evaluation.text import whole_text
from distprune.hardware import AUTO, name_of


@dataclass(frozen=True)
class PerplexityResult:
    """`nll`: mean negative log-likelihood in nats a predicted token; `perplexity` = exp(nll).

    `tokens`: how many were predicted, which is windows * (sequence_length - 1); `seconds`: spent in the
    forward passes, loading aside; `dtype`: what they were computed in.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    sequence_length: int
    seconds: float
    dtype: str


def evaluate_perplexity(
    model_path: str | Path,
    text: str | Path,
    sequence_length: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str | torch.dtype = AUTO,
    trust_remote_code: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
    field: str | None = None,
) -> PerplexityResult:
    """Load a model and measure its perplexity on a text source. See `perplexity_of_model`.

    `text` and `field` are what `read_source` takes. Everything that can be wrong with the text is checked before the
    weights are read. Raises InputError.
    """
    check_counts(batch_size, max_tokens)
    windows = read_windows(model_path, read_source(text, field), sequence_length, max_tokens, trust_remote_code)
    model = load_model(model_path, device, dtype, trust_remote_code)
    return _perplexity_of_windows(model, windows, batch_size, on_progress)


def perplexity_of_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    sequence_length: int = 128,
    max_tokens: int | None = None,
    batch_size: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """The perplexity of a loaded model on a text.

    The text is tokenized whole and without special tokens, its first `max_tokens` are cut into windows of
    `sequence_length` (what is left over is not used), and each window's tokens but the first are predicted
    from those before them in it. Cross entropy in float32, summed in float64. `batch_size` windows run at a
    time; `on_progress(done, total)` counts windows. Raises InputError when the text is too short.
    """
    windows = _windows(text, tokenizer, sequence_length, max_tokens, "the text")
    return _perplexity_of_windows(model, windows, batch_size, on_progress)


def check_counts(batch_size: int, max_tokens: int | None) -> None:
    """Raise InputError unless both counts are positive."""
    if batch_size < 1:
        raise InputError(f"--batch-size {batch_size}: at least 1 is needed.")
    if max_tokens is not None and max_tokens < 1:
        raise InputError(f"--max-tokens {max_tokens}: at least 1 is needed.")


def read_windows(
    model_path: str | Path, source: TextSource, length: int, max_tokens: int | None, trust_remote_code: bool = False
) -> Tensor:
    """Cut a source's text into the model's windows: int64 (windows, length). Reads no weights. Raises InputError."""
    check_sequence_length(length, load_config(model_path, trust_remote_code), model_path)
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    return _windows(whole_text(source, tokenizer), tokenizer, length, max_tokens, source.name)


def _windows(text: str, tokenizer: PreTrainedTokenizerBase, length: int, max_tokens: int | None, name: str) -> Tensor:
    """int64 (windows, length)"""
    ids = torch.from_numpy(tokenize(tokenizer, [text])[0][:max_tokens]).long()
    if len(ids) < length:
        limit = "" if max_tokens is None else f" within --max-tokens {max_tokens}"
        raise InputError(
            f"{name}: has {len(ids)} tokens{limit}, fewer than one window of {length}; "
            "give a longer text or a shorter --sequence-length."
        )
    return ids[: len(ids) // length * length].view(-1, length)


def _perplexity_of_windows(
    model: PreTrainedModel, windows: Tensor, batch_size: int, on_progress: Callable[[int, int], None] | None
) -> PerplexityResult:
    start, losses, done = time.perf_counter(), [], 0
    for batch in windows.split(batch_size):
        losses.append(summed_loss(model, batch))
        done += len(batch)
        if on_progress:
            on_progress(done, len(windows))
    return perplexity_result(losses, windows, time.perf_counter() - start, name_of(model.dtype))


@torch.inference_mode()
def summed_loss(model: PreTrainedModel, windows: Tensor) -> float:
    """The negative log-likelihood, in nats, of all windows' tokens but the first, in one forward pass.

    Args:
        windows: int64 (windows, length).
    """
    logits = model(input_ids=windows.to(input_device(model)), use_cache=False).logits
    # One window at a time, so that float32 logits are held for one and not for the batch.
    losses = [
        F.cross_entropy(row[:-1].float(), ids[1:].to(row.device), reduction="sum")
        for row, ids in zip(logits, windows, strict=True)
    ]
    return torch.stack(losses).double().sum().item()


def perplexity_result(losses: Sequence[float], windows: Tensor, seconds: float, dtype: str) -> PerplexityResult:
    """What the batches' summed losses, added up in their order, come to."""
    count, length = windows.shape
    tokens = count * (length - 1)
    nll = sum(losses) / tokens
    return PerplexityResult(
        perplexity=torch.tensor(nll, dtype=torch.float64).exp().item(),
        nll=nll,
        tokens=tokens,
        windows=count,
        sequence_length=length,
        seconds=seconds,
        dtype=dtype,
    )
