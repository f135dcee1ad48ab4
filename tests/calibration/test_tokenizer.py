from __future__ import annotations

import subprocess
import sys

import pytest

from distprune.calibration import load_tokenizer, tokenizer_fingerprint
from distprune.calibration.tokenizer import tokenize
from distprune.errors import InputError

TEXT = "The river runs to the sea. " * 20


def test_the_fingerprint_survives_saving_and_loading(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path / "once")
    once = load_tokenizer(tmp_path / "once")
    once.save_pretrained(tmp_path / "twice")
    fingerprints = {tokenizer_fingerprint(each) for each in (tokenizer, once, load_tokenizer(tmp_path / "twice"))}
    assert len(fingerprints) == 1
    assert len(fingerprints.pop()) == 64


def test_the_fingerprint_is_the_same_in_another_process(model_path):
    script = (
        "import sys; from distprune.calibration import load_tokenizer, tokenizer_fingerprint;"
        "print(tokenizer_fingerprint(load_tokenizer(sys.argv[1])))"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script, str(model_path)], check=True, capture_output=True, text=True
    ).stdout.strip()
    assert printed == tokenizer_fingerprint(load_tokenizer(model_path))


def test_the_fingerprint_ignores_padding_and_truncation(model_path):
    tokenizer = load_tokenizer(model_path)
    before = tokenizer_fingerprint(tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer(["a", "a longer text"], padding=True, truncation=True, max_length=4)
    assert tokenizer.backend_tokenizer.truncation is not None
    assert tokenizer_fingerprint(tokenizer) == before


def test_the_fingerprint_tells_tokenizers_apart(model_path, tokenizer):
    with_another_token = load_tokenizer(model_path)
    with_another_token.add_tokens(["unheard-of"])
    with_fewer_merges = load_tokenizer(model_path)
    state = with_fewer_merges.backend_tokenizer.model
    with_fewer_merges.backend_tokenizer.model = type(state)()
    fingerprints = {tokenizer_fingerprint(each) for each in (tokenizer, with_another_token, with_fewer_merges)}
    assert len(fingerprints) == 3


def test_whole_documents_are_tokenized_even_by_a_tokenizer_set_to_truncate(model_path, tokenizer):
    expected = tokenizer.backend_tokenizer.encode(TEXT, add_special_tokens=False).ids
    truncating = load_tokenizer(model_path)
    truncating(TEXT, truncation=True, max_length=4)
    assert tokenize(truncating, [TEXT])[0].tolist() == expected


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer could be loaded .*tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="none: no tokenizer could be loaded"):
        load_tokenizer(tmp_path / "none")
