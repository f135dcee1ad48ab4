"""Every method from a checkpoint to a checkpoint, for every family."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle, repeat
from pathlib import Path

import pytest
import torch
from kinds_of_methods import BRIEF, OF_ALL_MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

from distprune import load

ALIGN = 8
MODELS = {
    "llama": {"tie_word_embeddings": True, "dtype": torch.bfloat16, "max_shard_size": "60KB"},
    "mistral": {"dtype": torch.bfloat16, "sliding_window": 5},
    "qwen2": {"max_shard_size": "60KB"},
    "qwen3": {"dtype": torch.bfloat16, "head_dim": 32},
}


#: Every method with every option of saving that Llama stands for, and with one other family.
CASES = [
    ("llama", "olica", True),
    *(("llama", name, False) for name in OF_ALL_MODELS),
    *zip(cycle(["mistral", "qwen2", "qwen3"]), OF_ALL_MODELS, repeat(False), strict=False),
]


@pytest.fixture(scope="module")
def saved(save_model) -> Callable[[str], Path]:
    return cache(lambda family: save_model(family, **MODELS[family]))


@pytest.mark.parametrize(("family", "method", "count_embeddings"), CASES)
def test_the_result_opens_generates_and_meets_the_target(run, saved, family, method, count_embeddings):
    family_path = saved(family)
    options = {"method": method, "options": BRIEF.get(method, {}), "sparsity": 0.3, "align": ALIGN}
    folder, record = run(family_path, count_embeddings=count_embeddings, **options)
    dense = AutoModelForCausalLM.from_pretrained(family_path)
    pruned = load(folder)
    prefix = "" if record.layout == "stock" else "Pruned"
    assert type(pruned).__name__ == prefix + type(dense).__name__
    assert pruned.dtype == dense.dtype
    assert pruned.config.tie_word_embeddings == dense.config.tie_word_embeddings

    before, after = (sum(p.numel() for p in model.parameters()) for model in (dense, pruned))
    assert (record.total_parameters_before, record.total_parameters_after) == (before, after)
    decoders = (model.model.layers for model in (dense, pruned))
    decoder_before, decoder_after = (sum(p.numel() for p in decoder.parameters()) for decoder in decoders)
    assert (record.decoder_parameters_before, record.decoder_parameters_after) == (decoder_before, decoder_after)

    counted = before if count_embeddings else decoder_before
    step = 3 * ALIGN * dense.config.hidden_size  # of one layer's gate, up and down
    assert abs(before - after - 0.3 * counted) <= step

    prompt = AutoTokenizer.from_pretrained(folder)("The river runs", return_tensors="pt", return_token_type_ids=False)
    assert pruned.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_widths_are_aligned_and_the_last_layer_is_never_calibrated(pruned):
    _, record = pruned
    shapes = [layer.pruned for layer in record.layers]
    assert [shape.ffn.branch_rank is not None for shape in shapes] == [True, True, True, False]
    for shape in shapes:
        attention, ffn = shape.attention, shape.ffn
        widths = attention.value_dim, ffn.width, attention.query_rank, attention.key_rank, ffn.branch_rank or ALIGN
        assert all(width % ALIGN == 0 for width in widths)
    assert max(shape.ffn.width for shape in shapes) - min(shape.ffn.width for shape in shapes) <= ALIGN
