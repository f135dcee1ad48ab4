"""Calibration without any text: sequences that the model itself writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from distprune.calibration.sampling import MODEL_CHOOSES, Sampling, draw_random_tokens
from distprune.calibration.tokenizer import load_tokenizer
from distprune.calibration.whole_model import input_device, load_model
from distprune.errors import InputError
from distprune.hardware import AUTO
from distprune.modeling import CACHE

DEFAULT_SAMPLING = Sampling()


def generate_own_samples(
    model_path: str | Path,
    count: int,
    sequence_length: int,
    seed: int,
    batch_size: int = 128,
    device: str = "cpu",
    dtype: str | torch.dtype = AUTO,
    sampling: Sampling = DEFAULT_SAMPLING,
    on_progress: Callable[[int, int], None] | None = None,
    trust_remote_code: bool = False,
) -> np.ndarray:
    """Sample from the model -> int32 (count, sequence_length).

    The model draws from its whole distribution, after the token that begins a document and the random tokens that
    `sampling` asks for. The former is left out, as windows of text carry no special tokens either; the random tokens
    stay in. Where the model ends a document it goes on to the next. Global random state is neither used nor changed.
    `dtype` is what `load_model` takes; numbers near the edge of a token decide otherwise in another dtype.
    `on_progress(done, total)` counts tokens. Raises InputError when the model can't be loaded or has no opening token.
    """
    tokenizer = load_tokenizer(model_path, trust_remote_code)
    opening = opening_token(tokenizer, str(model_path))
    model = load_model(model_path, device, dtype, trust_remote_code)
    # One number decides one token: a sample depends on its own numbers and, except for rounding, not on its batch.
    uniform = torch.from_numpy(np.random.default_rng(seed).random((count, sequence_length)))
    vocab_size = model.get_input_embeddings().num_embeddings
    random = torch.from_numpy(draw_random_tokens(sampling, tokenizer, vocab_size, count, sequence_length, seed))
    samples, done = [], 0
    for numbers, given in zip(uniform.split(batch_size), random.split(batch_size), strict=True):
        columns = []
        for column in _sample(model, opening, numbers, given, sampling.temperature):
            columns.append(column)
            done += len(column)
            if on_progress:
                on_progress(done, count * sequence_length)
        samples.append(torch.stack(columns, dim=1))
    return torch.cat(samples).to(torch.int32).cpu().numpy()


def opening_token(tokenizer: PreTrainedTokenizerBase, name: str) -> int:
    """The id of the token that stands before a new document.

    `<|endoftext|>` where the vocabulary has it: chat models often call another token their beginning, the
    one that opens a turn of conversation, though they were trained on documents between these. Otherwise
    the beginning-of-sequence token, otherwise the end-of-sequence token. Raises InputError, under `name`.
    """
    separator = tokenizer.get_vocab().get("<|endoftext|>")
    for token in (separator, tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise InputError(f"{name}: its tokenizer has no token to begin a sample with; give text with --text.")


@torch.inference_mode()
def _sample(
    model: PreTrainedModel, opening: int, uniform: torch.Tensor, given: torch.Tensor, temperature: float
) -> Iterator[torch.Tensor]:
    """Turn uniform numbers in [0, 1), float64 (batch, length), into token ids: `length` times int64 (batch,).

    The tokens `given`, int64 (batch, length), stay as they are; the model chooses where there is MODEL_CHOOSES.
    """
    uniform, given = uniform.to(input_device(model)), given.to(input_device(model))
    tokens = torch.full((len(uniform),), opening, device=uniform.device)
    cache = DynamicCache(config=model.config)
    for numbers, random in zip(uniform.unbind(dim=1), given.unbind(dim=1), strict=True):
        output = model(input_ids=tokens[:, None], use_cache=True, **{CACHE: cache})
        chosen = _invert_cdf(output.logits[:, -1].to(uniform.device), numbers, temperature)
        tokens = torch.where(random == MODEL_CHOOSES, chosen, random)
        yield tokens


def _invert_cdf(logits: torch.Tensor, uniform: torch.Tensor, temperature: float) -> torch.Tensor:
    """Sample one token a row: the first whose cumulative probability exceeds the row's uniform number.

    It needs one random number a row, where torch.multinomial draws one for every word of the vocabulary,
    which would take as long as a small model's forward pass.
    """
    cumulative = torch.softmax(logits.float() / temperature, dim=-1).cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=logits.shape[-1] - 1)
