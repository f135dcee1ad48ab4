"""A sentence to read: the quickest look at whether a pruned model still speaks."""

from __future__ import annotations

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from distprune.calibration.whole_model import input_device


@torch.inference_mode()
def generate_sentence(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 40
) -> str:
    """Continue the prompt greedily -> the new text alone, without special tokens."""
    encoded = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(input_device(model))
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    tokens = model.generate(**encoded, generation_config=config)[0]
    return tokenizer.decode(tokens[encoded["input_ids"].shape[1] :], skip_special_tokens=True)
