"""The shapes that a method would give the layers, before anything is known of their activations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    even = EVEN_PROFILES.get(method.name)
    try:
        return method.plan(target, [even(dense[0]) if even else UnknownProfile()] * len(dense), align)
    except ProfileRead:
        pass
    target = replace(target, resource="parameters")
    return fill_with_ffn(target, [with_fewer_groups(shape, target.decoder_sparsity) for shape in dense], align)


class ProfileRead(Exception):
    """A plan depends on what is known of the layers' activations or gradients."""


class UnknownProfile(Mapping[str, torch.Tensor]):
    """A profile that can't be read: whether a method's plan needs one is seen by letting it plan.

    Raises:
        ProfileRead: whatever is asked of it.
    """

    def _refuse(self, *_: object):
        raise ProfileRead

    __getitem__ = __iter__ = __len__ = _refuse


def _curvature(shape: LayerShape) -> Profile:
    """What goes of a module costs its size times the square of its share; nothing is said of factors."""
    groups, width = shape.kv_heads, shape.query_key_dim + shape.value_dim

    def rising(units: int) -> torch.Tensor:
        return (torch.arange(units + 1, dtype=torch.float64) / units).square()

    def of_every_group(costs: torch.Tensor, size: int) -> torch.Tensor:
        return ((1 + shape.query_heads / groups) * size * costs).repeat(groups, 1)

    return {
        "group_order": torch.arange(groups),
        "group_costs": (groups + shape.query_heads) * width * rising(groups),
        "value_costs": of_every_group(rising(shape.value_dim).flip(0), shape.value_dim),
        "pair_costs": of_every_group(rising(shape.query_key_dim // 2), shape.query_key_dim),
        "ffn_widths": torch.arange(shape.ffn_width, -1, -1),
        "ffn_costs": 3 * shape.ffn_width * rising(shape.ffn_width),
    }


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


EVEN_PROFILES: dict[str, Callable[[LayerShape], Profile]] = {
    "curvature": _curvature,
    "flap": _flap,
    "olica": _olica,
    "oops": _oops,
}
