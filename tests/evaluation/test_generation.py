from __future__ import annotations

import torch

from distprune.evaluation import generate_sentence

PROMPT = "The river runs"


def greedy(model, tokenizer, prompt: str, count: int) -> list[int]:
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    prompt_length = ids.shape[1]
    for _ in range(count):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return ids[0, prompt_length:].tolist()


def test_the_sentence_is_the_most_likely_continuation(model, tokenizer):
    expected = tokenizer.decode(greedy(model, tokenizer, PROMPT, 12), skip_special_tokens=True)
    assert generate_sentence(model, tokenizer, PROMPT, max_new_tokens=12) == expected


def test_a_model_set_to_sample_still_answers_greedily(model, tokenizer):
    sampling = type(model)(model.config).eval()
    sampling.load_state_dict(model.state_dict())
    sampling.generation_config.update(do_sample=True, temperature=5.0, top_p=0.99)
    expected = generate_sentence(model, tokenizer, PROMPT, max_new_tokens=12)
    assert generate_sentence(sampling, tokenizer, PROMPT, max_new_tokens=12) == expected


def test_the_sentence_ends_with_its_document(model, tokenizer):
    ending = type(model)(model.config).eval()
    ending.load_state_dict(model.state_dict())
    with torch.no_grad():
        # Row `eos` of the head is what the last hidden state points along: the end comes at once.
        ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
        last = ending.model(ids).last_hidden_state[0, -1]
        ending.lm_head.weight[tokenizer.eos_token_id] = 100 * last
    assert generate_sentence(ending, tokenizer, PROMPT) == ""
