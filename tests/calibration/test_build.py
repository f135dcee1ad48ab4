from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from distprune.calibration import Sampling, build_calibration, load_tokenizer, open_calibration, tokenizer_fingerprint
from distprune.calibration.own_samples import generate_own_samples
from distprune.errors import InputError


@pytest.fixture
def rivers(tmp_path):
    path = tmp_path / "rivers.txt"
    path.write_text("The river runs down to the sea. " * 100)
    return path


@pytest.fixture
def pruners(tmp_path):
    path = tmp_path / "pruners.jsonl"
    lines = [json.dumps({"body": f"A pruner mends what is left of model {number}. " * 5}) for number in range(20)]
    path.write_text("\n".join(lines))
    return path


def test_sources_give_equal_shares_in_turn(model_path, tokenizer, rivers, pruners, tmp_path):
    built = build_calibration(
        model_path, texts=[rivers, pruners], field="body", samples=7, sequence_length=16, output=tmp_path / "c.arrow"
    )
    assert built.tokens.shape == (7, 16)
    texts = [tokenizer.decode(row) for row in built.tokens.tolist()]
    is_river = ["river" in text or "sea" in text for text in texts]
    assert is_river == [True, False] * 3 + [True]


def test_the_file_says_where_it_comes_from(model, model_path, rivers, tmp_path):
    output = tmp_path / "c.arrow"
    built = build_calibration(model_path, texts=[rivers], samples=4, sequence_length=16, seed=9, output=output)
    again = open_calibration(output)
    assert np.array_equal(built.tokens, again.tokens)
    assert built.metadata == again.metadata
    assert again.metadata.sources == ("rivers.txt",)
    assert (again.metadata.seed, again.metadata.self_generated) == (9, False)
    assert again.metadata.sampling is None
    assert again.metadata.vocab_size == model.config.vocab_size
    again.check_matches(tokenizer_fingerprint(load_tokenizer(model_path)), model.config.vocab_size, "tiny")


def test_the_same_input_gives_the_same_file(model_path, rivers, pruners, tmp_path):
    options = {"texts": [rivers, pruners], "field": "body", "samples": 6, "sequence_length": 16}
    for name in ("a", "b"):
        build_calibration(model_path, output=tmp_path / name, **options)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_text_the_model_writes_its_own(model_path, tmp_path):
    seen = []
    built = build_calibration(
        model_path,
        samples=3,
        sequence_length=8,
        seed=4,
        output=tmp_path / "c.arrow",
        on_progress=lambda *step: seen.append(step),
    )
    assert np.array_equal(built.tokens, generate_own_samples(model_path, 3, 8, 4))
    assert built.metadata.self_generated
    assert built.metadata.sources == ()
    assert built.metadata.sampling == Sampling()
    assert seen[-1] == (24, 24)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"samples": 0}, "--samples 0: at least 1"),
        ({"samples": 1, "texts": ["a.txt", "b.txt"]}, "--samples 1: fewer than the 2 texts"),
        ({"seed": -1}, "--seed -1"),
        ({"sequence_length": 1}, "--sequence-length 1: a window needs at least 2"),
        ({"sequence_length": 65}, r"--sequence-length 65: .* at most 64 tokens \(max_position_embeddings\)"),
        ({"sequence_length": 16, "texts": ["./missing.txt"]}, r"\./missing\.txt: no such file"),
    ],
)
def test_bad_options_are_refused_and_nothing_is_written(model_path, tmp_path, options, message):
    output = tmp_path / "c.arrow"
    with pytest.raises(InputError, match=message):
        build_calibration(model_path, output=output, **options)
    assert not output.exists()


def test_too_little_text_names_the_text(model_path, rivers, tmp_path):
    with pytest.raises(InputError, match=r"rivers\.txt: holds only \d+ windows of 64 tokens, and 500"):
        build_calibration(model_path, texts=[rivers], samples=500, sequence_length=64, output=tmp_path / "c.arrow")


def test_an_output_that_cannot_be_written_is_refused_before_any_work(model_path, tmp_path):
    with pytest.raises(InputError, match="is a directory"):
        build_calibration(
            model_path, sequence_length=16, output=tmp_path, on_progress=lambda *step: pytest.fail("began to work")
        )


def test_a_missing_model_is_refused(tmp_path):
    with pytest.raises(InputError, match="none: no causal language model could be loaded"):
        build_calibration(tmp_path / "none", output=tmp_path / "c.arrow")


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(model_path, rivers, tmp_path):
    path = shutil.copytree(model_path, tmp_path / "small")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "vocab_size": 40}))
    with pytest.raises(InputError, match="outside the model's vocabulary of 40"):
        build_calibration(path, texts=[rivers], samples=4, sequence_length=16, output=tmp_path / "c.arrow")
