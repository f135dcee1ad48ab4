"""Part of the GPU check: prefill and decoding of the dense model, and of pruned ones in both layouts.

Random weights, since speed does not depend on them: the dense 8B shape, what curvature left of it in the part before
(else what olica would leave), and the stock layout at the same sparsity.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_check_report import Rows, part_arguments
from random_model import config_of
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from distprune.budgets import Target
from distprune.evaluation.speed import measure
from distprune.families import family_of
from distprune.methods import make_method
from distprune.methods.curvature.menus import Reach
from distprune.methods.curvature.stock import equal_shapes
from distprune.modeling import PrunedConfig, PrunedForCausalLM

SPARSITY = 0.3
BATCHES = {"cuda": (1, 16, 64), "cpu": (1, 4)}
SHAPE = {"cuda": "8b", "cpu": "tiny"}
PROMPT, NEW, ROUNDS = 512, 64, 3


def main() -> None:
    arguments = part_arguments(__doc__)
    rows, device = Rows(arguments.rows), torch.device(arguments.device)
    dense: dict[int, tuple[float, float]] = {}
    for name, model in models(arguments, device):
        for batch in BATCHES[arguments.device]:
            prefill, decode = best_speed(model, batch)
            dense.setdefault(batch, (prefill, decode))
            ratios = prefill / dense[batch][0], decode / dense[batch][1]
            found = (
                f"prefill {prefill:,.0f} tokens/s ({ratios[0]:.2f}), decode {decode:,.0f} tokens/s ({ratios[1]:.2f})"
            )
            rows.add(f"{name}, batch {batch}", found, prefill=prefill, decode=decode)
        del model


def models(arguments, device: torch.device) -> Iterator[tuple[str, PreTrainedModel]]:
    changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    config = config_of(SHAPE[arguments.device], **changes)
    family = family_of(config)
    target = Target(family.dense_config(config), SPARSITY)
    yield "dense", build(LlamaForCausalLM, config, device)
    yield "free", build(PrunedForCausalLM, free_config(arguments.out, target), device)
    stock, _ = equal_shapes(target, Reach(8, 0.2))[-1]  # with all of its heads
    yield "stock", build(LlamaForCausalLM, family.stock_config(config, stock), device)


def free_config(out: Path, target: Target) -> PrunedConfig:
    for method in ("curvature", "olica"):
        if (out / f"{method}-pruned" / "config.json").is_file():
            return PrunedConfig.from_pretrained(out / f"{method}-pruned")
    shapes = make_method("olica", {}).even_shapes(target, 8)
    return PrunedConfig(**{**target.config.to_dict(), "layer_shapes": [asdict(shape) for shape in shapes]})


def build(
    model_class: type[PreTrainedModel], config: LlamaConfig | PrunedConfig, device: torch.device
) -> PreTrainedModel:
    """Make a model of random weights on the device, without a checkpoint."""
    with torch.device("meta"):
        model = model_class(config).to(torch.bfloat16)
    model = model.to_empty(device=device).eval()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.normal_(std=0.02)
        else:
            tensor.zero_()
    return model


def best_speed(model: PreTrainedModel, batch: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decoding, over the whole batch: the best of some rounds, but for the first."""
    rounds = [measure(model, batch, PROMPT, NEW) for _ in range(ROUNDS + 1)][1:]
    return max(made.prefill for made in rounds), max(made.decode for made in rounds)


if __name__ == "__main__":
    main()
