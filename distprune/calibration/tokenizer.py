"""A model's tokenizer, and what makes two tokenizers the same for calibration."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from distprune.errors import InputError

# Settings of one call, or of the special tokens around a text: none of them changes the ids of the text itself.
_VOLATILE = ("padding", "truncation", "post_processor")


def load_tokenizer(model_path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a local checkpoint or of a model on the Hugging Face Hub.

    Raises InputError when it can't be found or read.
    """
    try:
        return AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"{model_path}: no tokenizer could be loaded ({_first_line(error)}). "
            "Give a directory that holds tokenizer.json, or the name of a model on the Hugging Face Hub."
        ) from error


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of all that decides which ids a text gets, special tokens aside.

    That is the vocabulary and, where the tokenizer is a fast one, its normalizer, splitter and merges. It
    is the same on every machine and after `save_pretrained` and `from_pretrained`.
    """
    description: dict = {"vocabulary": tokenizer.get_vocab()}
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        description["backend"] = {key: value for key, value in backend.items() if key not in _VOLATILE}
    canonical = json.dumps(description, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str]) -> list[np.ndarray]:
    """The int32 token ids of each document, whole and without special tokens."""
    # verbose=False: a text longer than the model's context is no mistake here, for it is cut into windows.
    encoded = tokenizer(
        list(documents),
        add_special_tokens=False,
        return_attention_mask=False,
        truncation=False,
        verbose=False,
    )
    return [np.asarray(ids, dtype=np.int32) for ids in encoded["input_ids"]]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
