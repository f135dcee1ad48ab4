"""SmolLM2-135M, pruned on two workers: the one check on real weights that is quick enough for every run."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch
from gradients import assert_same, by_transformers, layer_by_layer
from smollm2 import bundled_smollm2
from transformers import AutoModelForCausalLM, AutoTokenizer

import distprune
from distprune.calibration import Sampling, generate_own_samples, load_tokenizer
from distprune.calibration.whole_model import load_model
from distprune.checkpoint import Checkpoint, resolve_model
from distprune.evaluation import generate_sentence, perplexity_of_model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory) -> Path:
    return resolve_model(str(bundled_smollm2()))


@pytest.fixture(scope="module")
def pruned(smollm2: Path, tmp_path_factory) -> tuple[Path, distprune.engine.RunRecord]:
    ray.shutdown()  # whatever earlier tests started: this run starts and stops its own
    output = tmp_path_factory.mktemp("real") / "pruned"
    record = distprune.prune(
        str(smollm2), output, sparsity=0.2, workers=2, samples=32, sequence_length=64, propagation="full"
    )
    return output, record


def test_a_quantized_model_is_imported_and_speaks(smollm2):
    assert len(Checkpoint.open(smollm2).tensors) == 272
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    reply = load_model(smollm2, "cpu").generate(**prompt, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(reply[0])


def test_a_fifth_of_the_decoder_is_gone(pruned):
    output, record = pruned
    model = distprune.load(output)
    left = sum(parameter.numel() for parameter in model.model.layers.parameters())
    one_step_of_one_layer = 8 * 3 * 576
    assert left == record.decoder_parameters_after
    assert abs(left - 0.8 * 106_202_880) <= one_step_of_one_layer


def test_the_pruned_model_still_predicts_text(smollm2, pruned):
    output, _ = pruned
    tokenizer = load_tokenizer(smollm2)
    tokens = generate_own_samples(smollm2, 16, 64, seed=7, sampling=Sampling(random_opening=0))
    text = "".join(tokenizer.batch_decode(tokens))

    def perplexity(path: Path) -> float:
        return perplexity_of_model(load_model(path, "cpu"), tokenizer, text, sequence_length=64).perplexity

    assert perplexity(output) < 2.5 * perplexity(smollm2)


def test_the_pruned_model_still_speaks(pruned):
    output, _ = pruned
    model, tokenizer = load_model(output, "cpu"), AutoTokenizer.from_pretrained(output)
    words = generate_sentence(model, tokenizer, "The best way to learn a language is", max_new_tokens=30).split()
    assert len(words) >= 10
    assert len(set(words)) >= 6  # it does not stammer


def test_gradients_layer_by_layer_are_those_of_the_whole_model(smollm2):
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    text = "The best way to learn a language is to speak it with those who know it well, every day and without fear."
    tokens = load_tokenizer(smollm2)(text, return_tensors="pt").input_ids[:, :20].view(2, 10)
    assert_same(layer_by_layer(model, tokens, micro_batch=1), by_transformers(model, tokens), 1e-3)
