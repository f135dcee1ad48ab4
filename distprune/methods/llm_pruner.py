"""LLM-Pruner: on the structural pruning of large language models (Ma et al., NeurIPS 2023).

What a unit is worth is how much the loss would change without it, to first order and weight by weight: the sum of
|w·∂L/∂w| over all weights that go together ("element-wise", with the gradient of the whole calibration set). Units are
compared within their layer; the first and last layers stay whole, and the others all lose as much. Heads leave by whole
KV groups, where the paper's models have one to a head.

Left out: the variants of the importance (a vector's, the diagonal Fisher's), and the fine-tuning that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from distprune.budgets import Target, fill_with_ffn
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear
from distprune.errors import InputError
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.uniform import keep_best, with_fewer_groups
from distprune.methods.units import sum_by_unit
from distprune.statistics import Cross, LayerStatistics, Moment

# Of each projection the taps of its input and of the gradient at its output.
TAPS = {
    "query": ("attention_input", "query_gradient"),
    "key": ("attention_input", "key_gradient"),
    "value": ("attention_input", "value_gradient"),
    "output": ("attention_values", "attention_output_gradient"),
    "gate": ("ffn_input", "gate_gradient"),
    "up": ("ffn_input", "up_gradient"),
    "down": ("ffn_neurons", "ffn_output_gradient"),
}
# Beside any other layer's, the width that a spared layer asks for.
ALL = 1e9


class LLMPruner(Method):
    name: ClassVar[str] = "llm-pruner"

    first_layers: float = Field(1 / 8, ge=0, le=1, description="share of the layers, from the first, that stay whole")
    last_layers: float = Field(1 / 16, ge=0, le=1, description="share of the layers, to the last, that stay whole")

    # ---------------------------------------------------------------- the gradient pass

    def gradient_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return [Cross(gradient, given) for given, gradient in TAPS.values()]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The importance of the layer's KV groups, (g,), and of its neurons, (f,)."""

        def importance(role: str, along: int) -> Tensor:
            """Sums of |w·∂L/∂w| over a projection's inputs (1), or its outputs (0)."""
            projection: Linear = getattr(layer, role)
            given, gradient = TAPS[role]
            changes = projection.weight.float() * statistics.cross(gradient, given)
            return changes.abs_().sum(dim=along).mul_(statistics.tokens)

        channels = *(importance(role, 1) for role in ("query", "key", "value")), importance("output", 0)
        return {
            "groups": sum(sum_by_unit(each, layer.kv_heads) for each in channels),
            "neurons": importance("gate", 1) + importance("up", 1) + importance("down", 0),
        }

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        self.plan(target, (), align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        first, last = (round(share * len(dense)) for share in (self.first_layers, self.last_layers))
        pruned = range(first, len(dense) - last)
        sparsity = target.decoder_sparsity * len(dense) / max(1, len(pruned))
        shapes = [with_fewer_groups(shape, sparsity) if index in pruned else shape for index, shape in enumerate(dense)]
        wanted = [1.0 if index in pruned else ALL for index in range(len(dense))]
        planned = fill_with_ffn(target, shapes, align, wanted)
        if any(planned[index] != dense[index] for index in range(len(dense)) if index not in pruned):
            raise InputError(
                f"sparsity {target.sparsity:g} can't be reached: the layers that stay whole (options first_layers and "
                "last_layers) leave too few others. Ask for a lower --sparsity, or let fewer layers stay whole."
            )
        return Plan(planned)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return ()

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        return keep_best(layer, planned, profile["groups"], profile["neurons"])
