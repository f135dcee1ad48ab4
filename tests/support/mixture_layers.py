"""Random layers with mixtures of experts, and what transformers' own modules do with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distprune.layers.architecture import Architecture
from distprune.layers.module import build_module
from distprune.layers.parts import DecoderLayer, Experts
from distprune.layers.runner import LayerRunner

EXPERTS, WIDTH = 8, 32
#: ``model_type`` -> what the fixture ``subject`` makes a layer with a mixture of.
MIXTURES: dict[str, dict] = {
    "mixtral": {"width": WIDTH, "num_local_experts": EXPERTS},
    "qwen2_moe": {
        "moe_intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 40,
    },
    "deepseek_v3": {
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "n_shared_experts": 2,
        "first_k_dense_replace": 0,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8,
        "v_head_dim": 8,
        "kv_heads": 4,
    },
    "gpt_oss": {"width": WIDTH, "num_local_experts": EXPERTS, "num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class Routed:
    """What a mixture's experts are called with over all micro-batches: (T, d), (T, k) and (T, k)."""

    hidden_states: Tensor
    chosen: Tensor
    weights: Tensor

    def to(self, expert: int) -> tuple[Tensor, Tensor]:
        """The hidden states that go to an expert and the weights that they go with, (tokens, d) and (tokens, 1)."""
        tokens, place = (self.chosen == expert).nonzero(as_tuple=True)
        return self.hidden_states[tokens], self.weights[tokens, place].unsqueeze(1)


def routed(model: Architecture, layer: DecoderLayer, hidden_states: Tensor) -> Routed:
    """What reaches the experts of a layer, seen from outside."""
    calls: list[list[Tensor]] = []
    runner = LayerRunner(model, torch.device("cpu"), torch.float32, micro_batch=len(hidden_states))
    module = runner.build(layer, 0, torch.float32)
    module.mlp.experts.register_forward_pre_hook(
        lambda _, given, named: calls.append([*given, *named.values()]), with_kwargs=True
    )
    with torch.no_grad():
        runner.forward(module, 0, hidden_states)
    return Routed(*(torch.cat(each) for each in zip(*calls, strict=True)))


@contextmanager
def eager_experts(model: Architecture, layer: DecoderLayer):
    """The experts' module, run as the family's own code says."""
    module = build_module(model, 0, layer, torch.float32).mlp.experts
    before = module.config._experts_implementation
    module.config._experts_implementation = "eager"
    try:
        yield module
    finally:
        module.config._experts_implementation = before


def output_of(experts: nn.Module, number: int, hidden_states: Tensor) -> Tensor:
    """What one expert makes of hidden states, (tokens, d), by transformers' own module."""
    chosen = torch.full((len(hidden_states), 1), number)
    with torch.no_grad():
        return experts(hidden_states, chosen, torch.ones(len(hidden_states), 1))


def kept_rows(dense: Tensor, pruned: Tensor) -> Tensor:
    """Which rows of a matrix another one has kept, ascending."""
    rows = (pruned[:, None] == dense[None]).all(dim=2)
    assert (rows.sum(dim=1) == 1).all()
    kept = rows.int().argmax(dim=1)
    assert (kept.diff() > 0).all()
    return kept


def change_each(experts: Experts, change: Callable[[int, Tensor], Tensor]) -> Tensor:
    """The experts' down projections (E, d, f), each changed by its number."""
    return torch.stack([change(number, down.clone()) for number, down in enumerate(experts.down)])
