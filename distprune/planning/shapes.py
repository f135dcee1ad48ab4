"""The shapes that a method would give the layers, before anything is known of their activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from distprune.budgets import Target, fill_with_ffn
from distprune.decoder_layer import LayerShape
from distprune.methods import Method, Profile
from distprune.methods.uniform import with_fewer_groups


def expected_shapes(method: Method, target: Target, align: int) -> list[LayerShape]:
    """The method's own plan for a model all of whose layers look alike, units being worth more or less evenly.

    A method of which no such profile is known is taken to narrow every layer by as much, of its parameters.

    Raises:
        InputError: the target can't be reached.
    """
    method.check_target(target, align)
    config = target.config
    dense = [config.layer_shape(index) for index in range(config.num_hidden_layers)]
    if target.sparsity == 0:
        return dense
    if not method.dense_moments(dense[0]):
        return method.plan(target, [{}] * len(dense), align)
    if method.name in EVEN_PROFILES:
        profile = EVEN_PROFILES[method.name](dense[0])
        return method.plan(target, [profile] * len(dense), align)
    target = replace(target, resource="parameters")
    return fill_with_ffn(target, [with_fewer_groups(shape, target.decoder_sparsity) for shape in dense], align)


def _flap(shape: LayerShape) -> Profile:
    """Scores standardized over channels: a group's, a mean of many, are nearer to zero than a neuron's."""
    return {
        "groups": torch.linspace(-0.5, 0.5, shape.kv_heads),
        "neurons": torch.linspace(-1.7, 1.7, shape.ffn_width),
    }


def _olica(shape: LayerShape) -> Profile:
    return {"ffn_linearity": torch.tensor(0.5), "attention_output_rms": torch.ones(1)}


def _oops(shape: LayerShape) -> Profile:
    """Every unit a share of its module's energy that grows linearly from the least to the greatest."""
    groups, heads, neurons = (
        torch.arange(1, count + 1).float() for count in (shape.kv_heads, shape.query_heads, shape.ffn_width)
    )
    return {
        "outlier_ratio": torch.tensor(0.0),
        "group_energy": groups / groups.sum(),
        "head_energy": (heads / heads.sum()).unflatten(0, (shape.kv_heads, -1)),
        "neuron_energy": neurons / neurons.sum(),
    }


EVEN_PROFILES: dict[str, Callable[[LayerShape], Profile]] = {"flap": _flap, "olica": _olica, "oops": _oops}
