"""What a plan was made from, in few numbers: the curves of each layer, for people to see where it cut."""

from __future__ import annotations

import torch
from torch import Tensor

from distprune.layers.shapes import ExpertsShape, LayerShape
from distprune.methods.base import CostCurve, Profile

#: Points of a curve, at most.
POINTS = 33
#: Digits of a cost that are kept.
DIGITS = 4


def recorded_curves(shape: LayerShape, profile: Profile) -> dict[str, CostCurve]:
    """The curves of :mod:`.curves` and :mod:`.mixture_curves`, by the field of the shape that is narrowed."""
    curves = attention_curves_of(profile) if shape.attention else {}
    if isinstance(shape.ffn, ExpertsShape):
        return curves | mixture_curves_of(profile)
    return curves | ({"ffn.width": curve(profile["ffn_widths"], profile["ffn_costs"])} if shape.ffn else {})


def attention_curves_of(profile: Profile) -> dict[str, CostCurve]:
    """Values and pairs go from all groups alike, so the groups' costs are summed."""
    groups, values, pairs = profile["group_costs"], profile["value_costs"].sum(0), profile["pair_costs"].sum(0)
    curves = {
        "attention.kv_heads": curve(falling(groups), groups),
        "attention.value_dim": curve(torch.arange(len(values)), values),
        "attention.query_key_dim": curve(2 * falling(pairs), pairs),
    }
    for name in ("query", "key", "output"):
        if f"{name}_costs" in profile:
            costs = profile[f"{name}_costs"]
            curves[f"attention.{name}_rank"] = curve(torch.arange(len(costs)), costs)
    return curves


def mixture_curves_of(profile: Profile) -> dict[str, CostCurve]:
    """The experts that are worth least go first; narrower, all are."""
    costs = profile["expert_costs"]
    worth = torch.cat([costs.new_zeros(1), costs[:, -1].sort().values.cumsum(0)])
    curves = {
        "ffn.count": curve(falling(worth), worth),
        "ffn.width": curve(profile["expert_widths"], costs.sum(0)),
    }
    if "shared_costs" in profile:
        curves["ffn.shared_width"] = curve(profile["shared_widths"], profile["shared_costs"])
    return curves


def falling(costs: Tensor) -> Tensor:
    """How much is kept where the costs are of going without the first 0, 1... of it."""
    return torch.arange(len(costs) - 1, -1, -1)


def curve(kept: Tensor, costs: Tensor) -> CostCurve:
    """The curve at some of its points, both ends among them."""
    order = kept.argsort(stable=True)
    places = order[torch.linspace(0, len(order) - 1, min(POINTS, len(order))).round().long()]
    return CostCurve(kept[places].tolist(), [float(f"{cost:.{DIGITS}g}") for cost in costs[places].tolist()])
