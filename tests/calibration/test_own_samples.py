from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from distprune.calibration.own_samples import _invert_cdf, generate_own_samples, opening_token
from distprune.calibration.sampling import Sampling
from distprune.errors import InputError


def tokenizer_with(vocabulary, **special) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({token: number for number, token in enumerate(vocabulary)}))
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def test_samples_are_what_the_model_gives_without_a_cache(model, model_path, tokenizer):
    samples = generate_own_samples(model_path, 5, 12, seed=0, sampling=Sampling(random_opening=3))
    assert samples.shape == (5, 12)
    assert samples.dtype == np.int32
    uniform = np.random.default_rng(0).random((5, 12))
    prefix = torch.full((5, 1), tokenizer.bos_token_id)
    for position in range(12):
        with torch.no_grad():
            logits = model(prefix).logits[:, -1].double().numpy()
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        cumulative = np.cumsum(odds / odds.sum(axis=1, keepdims=True), axis=1)
        chosen = (cumulative <= uniform[:, position : position + 1]).sum(axis=1)
        column = samples[:, position].astype(np.int64) if position < 3 else chosen
        prefix = torch.cat([prefix, torch.from_numpy(column)[:, None]], dim=1)
    assert np.array_equal(samples, prefix[:, 1:].numpy())


def test_tokens_are_drawn_with_the_models_probabilities():
    logits = torch.tensor([2.0, 0.0, -1.0, 1.0])
    uniform = torch.from_numpy(np.random.default_rng(0).random(40_000))
    drawn = _invert_cdf(logits.expand(40_000, -1), uniform, temperature=0.7)
    share = np.bincount(drawn.numpy(), minlength=4) / 40_000
    odds = np.exp(logits.double().numpy() / 0.7)
    assert share == pytest.approx(odds / odds.sum(), abs=0.01)


def test_impossible_tokens_are_never_drawn():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    numbers = torch.tensor([0.0, 0.499, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert _invert_cdf(logits.expand(4, -1), numbers, temperature=1.0).tolist() == [1, 1, 3, 3]


def test_generation_goes_on_past_the_end_of_a_document(model, model_path, tokenizer, tmp_path):
    indifferent = type(model)(model.config)
    with torch.no_grad():
        indifferent.model.norm.weight.zero_()  # all tokens are equally likely, the end among them
    indifferent.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    samples = generate_own_samples(tmp_path, 64, 30, seed=0)
    assert samples.shape == (64, 30)
    after_an_end = samples[:, 1:][samples[:, :-1] == tokenizer.eos_token_id]
    assert len(np.unique(after_an_end)) > 2


def test_the_seed_decides_the_samples_and_the_batch_size_does_not(model_path):
    together = generate_own_samples(model_path, 5, 10, seed=1)
    assert np.array_equal(together, generate_own_samples(model_path, 5, 10, seed=1, batch_size=2))
    assert not np.array_equal(together, generate_own_samples(model_path, 5, 10, seed=2))


def test_global_random_state_is_neither_used_nor_changed(model_path):
    torch.manual_seed(0)
    first = generate_own_samples(model_path, 2, 4, seed=0)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert np.array_equal(first, generate_own_samples(model_path, 2, 4, seed=0))
    assert torch.equal(state, torch.get_rng_state())


def test_progress_counts_up_to_all_tokens(model_path):
    seen = []
    generate_own_samples(model_path, 5, 4, seed=0, batch_size=3, on_progress=lambda *step: seen.append(step))
    assert [done for done, _ in seen] == [3, 6, 9, 12, 14, 16, 18, 20]
    assert {total for _, total in seen} == {20}


def test_a_document_separator_opens_in_place_of_a_chat_token():
    tokenizer = tokenizer_with(["<|im_start|>", "<|im_end|>", "<|endoftext|>", "a"], bos_token="<|im_start|>")
    assert opening_token(tokenizer, "model") == 2


def test_the_beginning_token_opens_and_the_end_token_where_there_is_none():
    assert opening_token(tokenizer_with(["a", "<s>", "</s>"], bos_token="<s>", eos_token="</s>"), "model") == 1
    assert opening_token(tokenizer_with(["a", "<s>", "</s>"], eos_token="</s>"), "model") == 2


def test_a_tokenizer_without_an_opening_is_refused_with_the_mend():
    with pytest.raises(InputError, match=r"the-model: .*give text with --text"):
        opening_token(tokenizer_with(["a", "b"]), "the-model")


def test_a_folder_without_weights_is_refused(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no causal language model could be loaded"):
        generate_own_samples(tmp_path, 1, 4, seed=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_cuda_device_that_is_not_there_is_refused(model_path):
    with pytest.raises(InputError, match="sees 0 CUDA devices"):
        generate_own_samples(model_path, 1, 4, seed=0, device="cuda")
