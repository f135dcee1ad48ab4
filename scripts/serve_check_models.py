"""Pruned checkpoints in every layout for `serve_check.sh`, and the greedy tokens that transformers gives for them.

    python scripts/serve_check_models.py FOLDER

Writes a folder a model, each with its tokenizer and expected.json: prompts, as tokens, and what follows. SmolLM2 is
real; Qwen3, Gemma 3, Phi-3 and the mixtures of experts Qwen3-MoE and Mixtral are small and random.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from layer_edits import (
    Edit,
    factored,
    fewer_groups,
    fewer_neurons,
    fewer_pairs,
    in_turn,
    narrower_values,
    with_biases,
    with_branch,
    without_attention,
    without_ffn,
)
from mixture_edits import fewer_experts, narrower_experts
from pruned_checkpoints import save_as_made, write_pruned
from smollm2 import bundled_smollm2
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from distprune.checkpoint import resolve_model
from distprune.modeling import load

PROMPTS = ["The capital of France is", "Once upon a time, there was a", "1, 2, 3, 4,"]
NEW_TOKENS = 24
SMALL = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 3}
#: Mixtures of experts: in the layout stock, and the first with layers whose experts are narrower or fewer.
MIXTURES = {
    "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 128},
}
FAMILIES = {"qwen3": {}, "gemma3_text": SLIDING, "phi3": {"hidden_size": 256, "pad_token_id": 0}}


def main(folder: Path) -> None:
    source = resolve_model(str(bundled_smollm2()))
    tokenizer = AutoTokenizer.from_pretrained(source)
    prompts = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    for name, model, edits in models(source, len(tokenizer)):
        pruned = write_pruned(model, edits, folder / name)
        if model.config.model_type in MIXTURES:
            save_as_made(load(pruned.folder), pruned.folder)
        tokenizer.save_pretrained(pruned.folder)
        expected = [greedy(pruned.folder, prompt) for prompt in prompts]
        (pruned.folder / "expected.json").write_text(json.dumps({"prompts": prompts, "tokens": expected}))
        print(name, pruned.layout, flush=True)


def models(source: Path, vocabulary: int) -> Iterator[tuple[str, PreTrainedModel, dict[int, Edit]]]:
    smollm2 = AutoConfig.from_pretrained(source)
    for layout, edits in layouts(smollm2.num_hidden_layers, 1408, 2, 48, 24).items():
        yield f"smollm2-{layout}", AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), edits
    for model_type, changes in FAMILIES.items():
        config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **SMALL | changes)
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layout, edits in layouts(6, 250, 2, width * 3 // 4, width * 3 // 8, has_pairs=model_type == "phi3").items():
            torch.manual_seed(0)
            yield f"{model_type}-{layout}", AutoModelForCausalLM.from_config(config, dtype=torch.float32), edits
    narrow_mixture = in_turn(narrower_experts(96), fewer_experts(6), fewer_groups(2))
    for name, edit in {"narrower": narrower_experts(96), "fewer": fewer_experts(6)}.items():
        config = AutoConfig.for_model("qwen3_moe", vocab_size=vocabulary, **SMALL | MIXTURES["qwen3_moe"])
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        yield f"qwen3_moe-{name}", model, dict.fromkeys((1, 3), edit)
    for model_type, changes in MIXTURES.items():
        config = AutoConfig.for_model(model_type, vocab_size=vocabulary, **SMALL | changes)
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        yield f"{model_type}-stock", model, dict.fromkeys(range(config.num_hidden_layers), narrow_mixture)


def layouts(
    layers: int, neurons: int, groups: int, values: int, pairs: int, has_pairs: bool = True
) -> dict[str, dict[int, Edit]]:
    """What is done to which layer, for each layout."""
    narrow = fewer_neurons(neurons)
    rotary = [fewer_pairs(pairs)] if has_pairs else []
    free = [
        in_turn(*rotary, narrower_values(values)),
        in_turn(factored(query=values, output=values), with_branch(8)),
        in_turn(fewer_groups(groups), narrow),
        in_turn(factored(query=values, key=values), narrower_values(values), with_biases),
        without_ffn,
    ]
    return {
        "stock": dict.fromkeys(range(layers), in_turn(narrow, fewer_groups(groups))),
        "heterogeneous": {
            index: in_turn(narrow, fewer_groups(groups)) if index % 4 else narrow for index in range(0, layers, 2)
        },
        "free": {index: free[index % len(free)] for index in range(layers - 1)},
        "without_attention": {layers // 2: without_attention},
    }


@torch.no_grad()
def greedy(folder: Path, prompt: list[int]) -> list[int]:
    model = load(folder, dtype=torch.float32)
    tokens = model.generate(torch.tensor([prompt]), max_new_tokens=NEW_TOKENS, do_sample=False)
    return tokens[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
