"""What others do with transformers' models, done with pruned ones: compilers, quantizers, pipelines."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from distprune.modeling import load


# The layout free has all that a compiler may stumble over; the model class is the same for heterogeneous.
@pytest.mark.parametrize(
    "layout",
    ["free", *(pytest.param(plainer, marks=pytest.mark.slow) for plainer in ("heterogeneous", "stock"))],
)
@torch.no_grad()
def test_compiled_models_compute_the_same(pruned, tokens, layout):
    checkpoint = pruned(layout)
    model = load(checkpoint.folder)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for length in (24, 17):
        found = compiled(tokens[:, :length]).logits
        torch.testing.assert_close(found, checkpoint.oracle(tokens[:, :length]).logits, atol=5e-5, rtol=1e-4)


@torch.no_grad()
def test_eight_bit_weights_by_quanto(checkpoint, tokens):
    quanto = pytest.importorskip("optimum.quanto", reason="quanto is not installed: pip install optimum-quanto")
    model = load(checkpoint.folder)
    quanto.quantize(model, weights=quanto.qint8)
    quanto.freeze(model)
    assert_close_enough(model, checkpoint, tokens)


@torch.no_grad()
def test_eight_bit_weights_by_torchao(checkpoint, tokens):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed: pip install torchao")
    model = load(checkpoint.folder)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert_close_enough(model, checkpoint, tokens)


def assert_close_enough(model, checkpoint, tokens) -> None:
    found, expected = model(tokens).logits, checkpoint.oracle(tokens).logits
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()


def test_pipelines_and_auto_classes_ask_no_question(checkpoint, tokenizer):
    tokenizer.save_pretrained(checkpoint.folder)
    assert AutoConfig.from_pretrained(checkpoint.folder).model_type == "llama"
    again = AutoTokenizer.from_pretrained(checkpoint.folder)
    assert again("The river").input_ids == tokenizer("The river").input_ids
    for model in (
        load(checkpoint.folder),
        AutoModelForCausalLM.from_pretrained(checkpoint.folder, trust_remote_code=True),
    ):
        generate = pipeline("text-generation", model=model, tokenizer=again)
        assert generate("a", max_new_tokens=3)[0]["generated_text"].startswith("a")


def test_the_pipeline_opens_the_folder(pruned, tokenizer):
    folder = pruned("free", vocab_size=len(tokenizer)).folder
    tokenizer.save_pretrained(folder)
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    assert generate("The river", max_new_tokens=3)[0]["generated_text"].startswith("The river")
