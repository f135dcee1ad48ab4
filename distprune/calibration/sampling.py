"""How the model's own samples are drawn: which tokens are the model's, and which are random."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

#: Stands in an array of token ids where the model chooses.
MODEL_CHOOSES = -1


@dataclass(frozen=True)
class Sampling:
    """How own samples are drawn.

    Random tokens lead the model to subjects and forms that it would seldom come to by itself.

    Attributes:
        temperature: of the model's distribution, from which its tokens are drawn.
        random_opening: how many tokens at the start of each sample are random.
    """

    temperature: float = 1.0
    random_opening: int = 4


def draw_random_tokens(
    sampling: Sampling, tokenizer: PreTrainedTokenizerBase, vocab_size: int, count: int, length: int, seed: int
) -> np.ndarray:
    """The random tokens of all samples -> int64 (count, length), MODEL_CHOOSES elsewhere.

    They are equally likely ordinary tokens. A sample's do not depend on `count`.
    """
    # Another stream than that of the numbers that decide the model's tokens.
    generator = np.random.default_rng([seed, 1])
    tokens = np.full((count, length), MODEL_CHOOSES)
    opening = min(sampling.random_opening, length)
    tokens[:, :opening] = generator.choice(ordinary_tokens(tokenizer, vocab_size), (count, opening))
    return tokens


def ordinary_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> np.ndarray:
    """The ids below `vocab_size` of all tokens that text can be made of, ascending, int64 (tokens,).

    Special and added tokens are left out. A vocabulary of nothing else is taken whole.
    """
    known = {token for token in tokenizer.get_vocab().values() if token < vocab_size}
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    return np.array(sorted(known - special or known))
