from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chisquare
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from distprune.calibration.sampling import MODEL_CHOOSES, Sampling, draw_random_tokens, ordinary_tokens


@pytest.fixture
def words() -> PreTrainedTokenizerFast:
    """Ids 0, 1 and 12 are special, 2 to 11 are words."""
    vocabulary = ["<s>", "</s>", *"abcdefghij", "<tool>"]
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    return tokenizer


def test_special_tokens_and_those_outside_the_models_vocabulary_are_not_ordinary(words):
    assert ordinary_tokens(words, 100).tolist() == list(range(2, 12))
    assert ordinary_tokens(words, 8).tolist() == list(range(2, 8))


def test_a_vocabulary_of_special_tokens_alone_is_taken_whole(words):
    assert ordinary_tokens(words, 2).tolist() == [0, 1]


def test_samples_open_with_random_tokens_and_the_model_chooses_the_rest(words):
    drawn = draw_random_tokens(Sampling(random_opening=4), words, 13, 2_000, 9, seed=0)
    assert (drawn[:, 4:] == MODEL_CHOOSES).all()
    for column in drawn[:, :4].T:
        assert chisquare(np.bincount(column, minlength=12)[2:]).pvalue > 1e-3


def test_a_sample_shorter_than_its_opening_is_all_random(words):
    assert (draw_random_tokens(Sampling(random_opening=4), words, 13, 5, 3, seed=0) >= 2).all()


def test_more_samples_begin_with_the_same_ones_and_another_seed_gives_others(words):
    few, many = (draw_random_tokens(Sampling(), words, 13, count, 16, seed=3) for count in (5, 50))
    assert np.array_equal(few, many[:5])
    assert not np.array_equal(many, draw_random_tokens(Sampling(), words, 13, 50, 16, seed=4))
