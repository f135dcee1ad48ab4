"""Part of the GPU check: prefill and decoding of the dense model, and of pruned ones in the free and the stock layout.

Random weights, since speed does not depend on them: the dense 8B shape, what curvature left of it in the part before
(else what it would leave of layers that are all alike), and the stock layout at the same sparsity.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from gpu_check_report import Rows, part_arguments
from random_model import config_of, random_of, random_pruned
from transformers import AutoConfig, PreTrainedModel

from distprune.budgets import Target
from distprune.evaluation.speed import measure
from distprune.layers.architecture import Architecture
from distprune.methods import make_method
from distprune.methods.curvature.menus import Reach
from distprune.methods.curvature.stock import choices_alike

SPARSITY = 0.3
BATCHES = {"cuda": (1, 16, 64), "cpu": (1, 4)}
SHAPE = {"cuda": "8b", "cpu": "tiny"}
PROMPT, NEW, ROUNDS = 512, 64, 3
ALIGN, LEAST = 8, 0.2


def main() -> None:
    arguments = part_arguments(__doc__)
    rows = Rows(arguments.rows)
    dense: dict[int, tuple[float, float]] = {}
    for name, model in models(arguments):
        for batch in BATCHES[arguments.device]:
            prefill, decode = best_speed(model, batch)
            dense.setdefault(batch, (prefill, decode))
            ratios = prefill / dense[batch][0], decode / dense[batch][1]
            found = (
                f"prefill {prefill:,.0f} tokens/s ({ratios[0]:.2f}), decode {decode:,.0f} tokens/s ({ratios[1]:.2f})"
            )
            rows.add(f"{name}, batch {batch}", found, prefill=prefill, decode=decode)
        del model


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, PreTrainedModel]]:
    changes = {"num_hidden_layers": arguments.layers} if arguments.layers else {}
    architecture = Architecture(config_of(SHAPE[arguments.device], **changes))
    places = {"dtype": torch.bfloat16, "device": arguments.device}
    yield "dense", random_of(architecture.config, **places)
    if (left := arguments.out / "curvature-pruned" / "config.json").is_file():
        yield "free", random_of(AutoConfig.from_pretrained(left), **places)
    else:
        shapes = make_method("curvature", {}).even_shapes(Target(architecture, SPARSITY), ALIGN)
        yield "free", random_pruned(architecture, shapes, **places)
    *_, with_all_heads = choices_alike(Target(architecture, SPARSITY, layout="stock"), Reach(ALIGN, LEAST))
    yield "stock", random_pruned(architecture, with_all_heads.shapes, **places)


def best_speed(model: PreTrainedModel, batch: int) -> tuple[float, float]:
    """Tokens a second of prefill and of decoding, over the whole batch: the best of some rounds, the first excepted."""
    rounds = [measure(model, batch, PROMPT, NEW) for _ in range(ROUNDS + 1)][1:]
    return max(made.prefill for made in rounds), max(made.decode for made in rounds)


if __name__ == "__main__":
    main()
