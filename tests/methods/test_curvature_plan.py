"""Curvature's plans: they meet their targets, and take first what is said to be missed least."""

from __future__ import annotations

from dataclasses import replace
from math import lcm

import numpy as np
import pytest
import torch

from distprune.budgets import RESOURCES, Target, is_stock
from distprune.errors import InputError
from distprune.methods import Profile, make_method
from distprune.modeling import LayerShape, PrunedConfig

LAYERS, HIDDEN, FFN, ALIGN = 4, 256, 1024, 8
FAMILIES = {
    "grouped queries": {"num_key_value_heads": 4},
    "multi-head": {"num_key_value_heads": 8},
    "one group": {"num_key_value_heads": 1},
    "normed heads": {"num_key_value_heads": 4, "query_key_norm": True, "head_dim": 64},
    "biases": {"num_key_value_heads": 4, "attention_bias": True, "attention_output_bias": True, "mlp_bias": True},
}
ALL_FAMILIES = pytest.mark.parametrize("family", FAMILIES)


def config_of(family: str) -> PrunedConfig:
    sizes = {"vocab_size": 50, "hidden_size": HIDDEN, "intermediate_size": FFN, "num_hidden_layers": LAYERS}
    return PrunedConfig(**sizes | {"num_attention_heads": 8, "head_dim": 32} | FAMILIES[family])


def rising(*size: int, generator: torch.Generator) -> torch.Tensor:
    """From zero on, convex: what goes first is missed least."""
    steps = torch.rand(*size, generator=generator, dtype=torch.float64).sort(dim=-1).values
    return torch.cat([steps.new_zeros(*size[:-1], 1), steps.cumsum(-1)], dim=-1)


def rank_costs(out: int, generator: torch.Generator) -> torch.Tensor:
    """Falling, from rank zero to the greatest that saves anything."""
    most = (out * HIDDEN - 1) // (out + HIDDEN)
    return rising(out, generator=generator).flip(0)[: most + 1] / 16


def profile_of(shape: LayerShape, seed: int) -> Profile:
    """Random costs, everything of a layer mattering more or less than in the other layers."""
    generator = torch.Generator().manual_seed(seed)
    groups, pairs, steps = shape.kv_heads, shape.query_key_dim // 2, 32
    scale = 2.0**seed
    outputs = {"query": shape.query_heads * shape.query_key_dim, "key": groups * shape.query_key_dim, "output": HIDDEN}
    return {
        "group_order": torch.randperm(groups, generator=generator),
        "group_costs": scale * rising(groups, generator=generator),
        "value_rotation": torch.eye(shape.value_dim).repeat(groups, 1, 1),
        "value_costs": scale * rising(groups, shape.value_dim, generator=generator).flip(1) / 16,
        "pair_order": torch.stack([torch.randperm(pairs, generator=generator) for _ in range(groups)]),
        "pair_costs": scale * rising(groups, pairs, generator=generator) / 16,
        **{f"{name}_costs": scale * rank_costs(out, generator) for name, out in outputs.items()},
        "neuron_order": torch.randperm(shape.ffn_width, generator=generator),
        "ffn_widths": torch.arange(steps, -1, -1) * (shape.ffn_width // steps),
        "ffn_costs": scale * rising(steps, generator=generator),
    }


def with_branches(profile: Profile, worth: float) -> Profile:
    """At every width the same share of the FFN's cost is saved: the more the higher the rank, at most ``worth``."""
    widths = [7 * FFN // 8, FFN // 2, FFN // 8]
    costs = np.interp(widths, profile["ffn_widths"].flip(0), profile["ffn_costs"].flip(0))
    shares = worth * (1 - torch.exp(-torch.arange(HIDDEN // 4 + 1) / 8))
    return profile | {"branch_widths": torch.tensor(widths), "branch_savings": torch.tensor(costs)[:, None] * shares}


def profiles_of(config: PrunedConfig) -> list[Profile]:
    return [profile_of(config.layer_shape(index), index) for index in range(LAYERS)]


def planned(target: Target, profiles: list[Profile] | None = None, align: int = ALIGN, **options) -> list[LayerShape]:
    method = make_method("curvature", options)
    method.check_target(target, align)
    return method.plan(target, profiles or profiles_of(target.config), align)


def free(profile: Profile, *names: str) -> Profile:
    return profile | {name: torch.zeros_like(profile[name]) for name in names}


ATTENTION = ("group_costs", "value_costs", "pair_costs", "query_costs", "key_costs", "output_costs")


def one_step(target: Target) -> int:
    """What as many neurons as the alignment take; of a KV cache, which FFNs have no part in, a group, or as many values
    of all groups."""
    [dense, *_] = target.dense_shapes
    if target.resource == "kv-cache":
        least = [
            replace(dense, value_dim=dense.value_dim - ALIGN),
            *([without_groups(dense, 1)] if dense.kv_heads > 1 else []),
        ]
        return target.amount([dense]) - min(target.amount([shape]) for shape in least)
    return target.amount([dense]) - target.amount([replace(dense, ffn_width=FFN - ALIGN)])


def without_groups(shape: LayerShape, gone: int) -> LayerShape:
    heads = shape.query_heads // shape.kv_heads
    return replace(shape, kv_heads=shape.kv_heads - gone, query_heads=heads * (shape.kv_heads - gone))


@ALL_FAMILIES
@pytest.mark.parametrize("resource", RESOURCES)
@pytest.mark.parametrize("sparsity", [0.05, 0.25, 0.6])
def test_a_plan_meets_its_target_within_one_step(family, resource, sparsity):
    target = Target(config_of(family), sparsity, resource=resource)
    # Neurons being cheap, there are some to give back, but where attention takes most.
    cheap = [profile | {"ffn_costs": profile["ffn_costs"] / 30} for profile in profiles_of(target.config)]
    plan = planned(target, [with_branches(profile, 0.5) for profile in cheap])
    assert 0 <= target.remaining - target.amount(plan) <= one_step(target)


@ALL_FAMILIES
@pytest.mark.parametrize("align", [3, 8, 64])
def test_widths_are_whole_or_multiples_and_modules_lose_the_largest_cut_or_go(family, align):
    target = Target(config_of(family), 0.5)
    dense = target.dense_shapes[0]
    plan = planned(target, align=align, largest_cut=0.6)
    assert target.amount(plan) <= target.remaining
    for shape in plan:
        names = ("query_key_dim", "value_dim") * shape.has_attention + ("ffn_width",) * shape.has_ffn
        for name in names:
            width, full = getattr(shape, name), getattr(dense, name)
            step = lcm(2, align) if name == "query_key_dim" else align  # pairs of coordinates
            assert width == full or (width % step == 0 and 0.4 * full - step <= width < full)
        assert shape.query_heads == shape.kv_heads * (dense.query_heads // dense.kv_heads)
        ranks = (shape.query_rank, shape.key_rank, shape.output_rank)
        assert all(rank is None or rank % align == 0 for rank in ranks)
        if shape.has_attention:
            assert shape.kv_heads >= max(1, round(0.4 * dense.kv_heads))
            assert not target.config.query_key_norm or shape.query_key_dim == dense.query_key_dim


@ALL_FAMILIES
def test_a_cache_is_made_smaller_at_no_ffns_cost(family):
    target = Target(config_of(family), 0.4, resource="kv-cache")
    assert {shape.ffn_width for shape in planned(target)} == {FFN}


def test_ffns_get_branches_where_these_save_more_than_neurons_do():
    target = Target(config_of("grouped queries"), 0.4)
    cheap = [profile | {"ffn_costs": profile["ffn_costs"] / 30} for profile in profiles_of(target.config)]
    useless, useful = (planned(target, [with_branches(profile, worth) for profile in cheap]) for worth in (0.0, 0.9))
    assert all(shape.calibration_rank is None for shape in useless)
    narrow = [shape for shape in useful if 0 < shape.ffn_width < FFN]
    assert narrow and all(shape.calibration_rank for shape in narrow)
    assert all(shape.calibration_rank is None for shape in useful if shape not in narrow)
    assert useful.predicted_loss < useless.predicted_loss
    assert planned(target, [with_branches(profile, 0.9) for profile in cheap], align=16)[0].calibration_rank % 16 == 0


def test_layers_that_matter_more_keep_more():
    target = Target(config_of("grouped queries"), 0.4)
    widths = [target.amount([shape]) for shape in planned(target)]
    assert widths == sorted(widths) and widths[0] < widths[-1]


@ALL_FAMILIES
def test_modules_that_cost_nothing_go_whole_but_never_the_first_layers_attention(family):
    config = config_of(family)
    profiles = profiles_of(config)
    profiles[0], profiles[2] = (free(profiles[index], *ATTENTION) for index in (0, 2))
    profiles[1] = free(profiles[1], "ffn_costs")
    plan = planned(Target(config, 0.45), profiles)
    assert plan[0].has_attention
    assert not plan[2].has_attention
    assert not plan[1].has_ffn
    gone = plan[2]
    assert gone.query_heads == gone.kv_heads == gone.query_key_dim == gone.value_dim == 0
    assert not gone.output_bias and not plan[1].down_bias


def test_a_model_whose_attention_is_worth_nothing_keeps_it_in_the_first_layer():
    config = config_of("multi-head")
    profiles = [free(profile, *ATTENTION) for profile in profiles_of(config)]
    plan = planned(Target(config, 0.6), profiles)
    assert [shape.has_attention for shape in plan] == [True, False, False, False]


def test_groups_values_and_pairs_that_cost_nothing_go_and_the_others_stay():
    """What the profile says is free is as much as must go."""
    config = config_of("grouped queries")
    target = Target(config, 0.0)
    dense = target.dense_shapes[0]
    cut = {
        "group_costs": (2, without_groups(dense, 2)),
        "value_costs": (16, replace(dense, value_dim=16)),
        "pair_costs": (8, replace(dense, query_key_dim=16)),
    }
    for name, (gone, expected) in cut.items():
        dear = [{key: 100 * values if "costs" in key else values for key, values in profile.items()}
                for profile in profiles_of(config)]  # fmt: skip
        for profile in dear:
            costs = profile[name].clone()
            if name == "value_costs":
                costs[..., gone:] = 0
            else:
                costs[..., : gone + 1] = 0
            profile[name] = costs
        left = target.amount([expected] * LAYERS)
        plan = planned(Target(config, 1 - left / target.dense), dear)
        assert plan == [expected] * LAYERS


def test_without_sparsity_nothing_goes_though_it_were_free():
    config = config_of("grouped queries")
    profiles = [free(profile, *ATTENTION, "ffn_costs") for profile in profiles_of(config)]
    for stock in (False, True):
        target = Target(config, 0.0, stock=stock)
        assert planned(target, profiles) == target.dense_shapes


def test_the_embeddings_share_comes_from_the_decoder_layers():
    target = Target(config_of("grouped queries"), 0.3, count_embeddings=True)
    plan = planned(target)
    assert target.dense - target.amount(plan) >= round(0.3 * target.counted)
    assert 0 <= target.remaining - target.amount(plan) <= one_step(target)


@pytest.mark.parametrize("layout", ["per-layer", "stock"])
def test_a_plan_tells_what_its_options_cost_together(layout):
    """Attention is too dear to lose any of it, so that only FFNs count, whose costs are easily summed here."""
    target = Target(config_of("multi-head"), 0.25, stock=layout == "stock")
    profiles = [profile | {name: 1e6 * profile[name] for name in ATTENTION} for profile in profiles_of(target.config)]
    plan = planned(target, profiles)

    def cost(steps_less: int) -> float:
        widths = [shape.ffn_width - steps_less * ALIGN for shape in plan]
        curves = [(profile["ffn_widths"].flip(0), profile["ffn_costs"].flip(0)) for profile in profiles]
        return sum(np.interp(width, *curve) for width, curve in zip(widths, curves, strict=True))

    # Single steps of width are given back once options are chosen.
    assert cost(0) * (1 - 1e-9) <= plan.predicted_loss <= cost(2)
    assert 0 <= plan.gap <= 1e-3


def test_the_more_goes_the_more_the_loss_is_predicted_to_rise():
    config = config_of("grouped queries")
    losses = [planned(Target(config, sparsity)).predicted_loss for sparsity in (0.0, 0.1, 0.3, 0.5)]
    assert losses[0] == 0
    assert losses == sorted(set(losses))


def test_the_same_profiles_give_the_same_plan():
    target = Target(config_of("biases"), 0.35)
    assert planned(target) == planned(target)


# ------------------------------------------------------------------ the original architecture


@ALL_FAMILIES
@pytest.mark.parametrize("resource", ["parameters", "flops", "bytes"])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.35])
def test_a_stock_plan_is_one_that_the_original_architecture_can_have(family, resource, sparsity):
    target = Target(config_of(family), sparsity, resource=resource, stock=True)
    plan = planned(target)
    assert is_stock(target.config, plan)
    if plan[0].ffn_width == FFN:  # even a whole FFN leaves some, but not enough for more groups
        assert target.amount(plan) <= target.remaining
        assert target.remaining < target.amount([without_groups(plan[0], -plan[0].kv_heads)] * LAYERS)
        return
    assert abs(target.amount(plan) - target.remaining) <= LAYERS * one_step(target) / 2


def test_a_stock_cache_loses_as_many_groups_as_it_must():
    target = Target(config_of("multi-head"), 0.4, resource="kv-cache", stock=True)
    [shape] = set(planned(target))
    assert shape == without_groups(target.dense_shapes[0], 4)


def test_a_stock_plan_takes_groups_where_they_cost_less_than_neurons():
    target = Target(config_of("multi-head"), 0.3, stock=True)
    profiles = profiles_of(target.config)
    spared = planned(target, [{**profile, "group_costs": 100 * profile["group_costs"]} for profile in profiles])
    taken = planned(target, [{**profile, "ffn_costs": 100 * profile["ffn_costs"]} for profile in profiles])
    assert spared[0].kv_heads == 8 > taken[0].kv_heads
    assert spared[0].ffn_width < taken[0].ffn_width


def test_a_stock_plan_meets_its_target_though_groups_cost_nothing():
    target = Target(config_of("multi-head"), 0.05, stock=True)
    plan = planned(target, [free(profile, "group_costs") for profile in profiles_of(target.config)])
    assert abs(target.amount(plan) - target.remaining) <= LAYERS * one_step(target) / 2


def test_a_cache_that_one_group_holds_can_not_be_made_smaller_in_the_original_architecture():
    target = Target(config_of("one group"), 0.3, resource="kv-cache", stock=True)
    with pytest.raises(InputError, match=r"can't be reached with the same widths.*--layout"):
        planned(target)


def test_more_than_the_layers_hold_is_refused():
    with pytest.raises(InputError, match=r"can't be reached.*--sparsity"):
        planned(Target(config_of("grouped queries"), 0.999))
