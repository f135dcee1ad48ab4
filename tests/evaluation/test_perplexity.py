from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distprune.errors import InputError
from distprune.evaluation import evaluate_perplexity, perplexity_of_model

TEXT = "The river runs down to the sea, and a pruner mends what is left of the model. " * 12


def numpy_nll(model, ids: list[int], length: int) -> float:
    """Mean negative log-likelihood in float64, one window and one token after the other."""
    losses = []
    for first in range(0, len(ids) - length + 1, length):
        window = ids[first : first + length]
        with torch.no_grad():
            logits = model(torch.tensor([window])).logits[0].double().numpy()
        for position in range(length - 1):
            row = logits[position]
            losses.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[window[position + 1]])
    return float(np.mean(losses))


@pytest.fixture(scope="session")
def ids(tokenizer) -> list[int]:
    return tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids


@pytest.mark.parametrize("length", [2, 16, 64])
def test_perplexity_is_that_of_a_plain_float64_computation(model, model_path, ids, text_path, length):
    result = evaluate_perplexity(model_path, text_path, length, batch_size=3)
    assert result.nll == pytest.approx(numpy_nll(model, ids, length), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.nll), rel=1e-12)
    assert result.windows == len(ids) // length
    assert result.tokens == result.windows * (length - 1)
    assert result.sequence_length == length
    assert result.seconds > 0


def test_only_the_first_tokens_count_when_limited(model, model_path, ids, text_path):
    result = evaluate_perplexity(model_path, text_path, 16, max_tokens=100)
    assert result.windows == 6
    assert result.nll == pytest.approx(numpy_nll(model, ids[:96], 16), rel=1e-5)


def test_a_loaded_model_gives_the_same_result(model, tokenizer, model_path, text_path):
    loaded = perplexity_of_model(model, tokenizer, TEXT, 16)
    assert loaded.nll == pytest.approx(evaluate_perplexity(model_path, text_path, 16).nll, rel=1e-6)


def test_the_batch_size_does_not_matter(model, tokenizer):
    results = [perplexity_of_model(model, tokenizer, TEXT, 16, batch_size=size).nll for size in (1, 4, 100)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)


def test_the_dtype_asked_for_is_used(model_path, text_path, model, ids):
    result = evaluate_perplexity(model_path, text_path, 16, dtype="bfloat16", device="cpu")
    exact = numpy_nll(model, ids, 16)
    assert result.nll != pytest.approx(exact, rel=1e-7)
    assert result.nll == pytest.approx(exact, rel=0.05)


def test_progress_counts_windows(model, tokenizer, ids):
    seen = []
    perplexity_of_model(model, tokenizer, TEXT, 16, 80, batch_size=2, on_progress=lambda *step: seen.append(step))
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_a_hopeless_model_has_infinite_perplexity_and_no_error(model, tokenizer):
    hopeless = type(model)(model.config).eval()
    hopeless.load_state_dict(model.state_dict())
    with torch.no_grad():
        hopeless.lm_head.weight.mul_(1e5)
    assert perplexity_of_model(hopeless, tokenizer, TEXT, 16).perplexity == math.inf


def test_a_text_too_short_for_one_window_is_refused(model_path, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("The sea.")
    with pytest.raises(InputError, match=r"short\.txt: has \d tokens, fewer than one window of 32"):
        evaluate_perplexity(model_path, path, 32)


def test_a_limit_below_one_window_is_refused(model_path, text_path):
    with pytest.raises(InputError, match="has 10 tokens within --max-tokens 10, fewer than one window of 32"):
        evaluate_perplexity(model_path, text_path, 32, max_tokens=10)


def test_a_missing_text_is_refused(model_path, tmp_path):
    with pytest.raises(InputError, match=r"none\.txt: no such file"):
        evaluate_perplexity(model_path, tmp_path / "none.txt", 16)


def test_a_missing_model_is_refused(tmp_path, text_path):
    with pytest.raises(InputError, match="none: no causal language model could be loaded"):
        evaluate_perplexity(tmp_path / "none", text_path)


@pytest.mark.parametrize(("length", "message"), [(1, "at least 2 tokens"), (65, "at most 64 tokens")])
def test_a_sequence_length_out_of_range_is_refused(model_path, text_path, length, message):
    with pytest.raises(InputError, match=message):
        evaluate_perplexity(model_path, text_path, length)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "--batch-size 0"),
        ({"max_tokens": -5}, "--max-tokens -5"),
        ({"dtype": "floaty"}, "--dtype floaty"),
        ({"device": "toaster"}, "--device toaster"),
    ],
)
def test_options_without_meaning_are_refused(model_path, text_path, options, message):
    with pytest.raises(InputError, match=message):
        evaluate_perplexity(model_path, text_path, 16, **options)
