"""OOPS: outlier-aware unit selection and quadratic-programming reconstruction (Wei et al., Neural Networks 2026).

The paper is behind a paywall: this is a reading of its abstract and of its authors' earlier SoBP (EMNLP 2024), and not
a copy of their code. Units are KV groups of attention, query heads within a group (as many from each, since the groups
of a layer are all of one size), and neurons of the FFN.

With c_u(x) what unit u adds to its module's output, Q_uv = E⟨c_u, c_v⟩ says how units act together: (W_dᵀW_d) ∘ E[aᵀa]
for FFN neurons a, and tr(W_u E[z_uᵀz_v] W_vᵀ) for the heads' slices z_u of the output projection's input.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import inf
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import (
    Target,
    affordable_neurons,
    fill_with_ffn,
    layer_parameters,
    outlier_ratio,
    outlier_weighted,
)
from distprune.decoder_layer import DecoderLayer, LayerShape, Linear
from distprune.errors import ConvergenceWarning
from distprune.methods.base import Method, Observe, Plan, Profile
from distprune.methods.units import (
    column_energy,
    head_interaction,
    heads_of_groups,
    keep_heads,
    keep_neurons,
    neuron_interaction,
    sum_by_unit,
    with_heads,
)
from distprune.solvers import QuadraticSolution, box_ridge, channels_of, most_important, relaxed_selection
from distprune.statistics import Gram, HeadGram, LayerStatistics, Moment, Peak, Power

ATTENTION_TAPS = ("attention_input", "attention_values")
FFN_TAPS = ("ffn_input", "ffn_neurons")


class Oops(Method):
    name: ClassVar[str] = "oops"

    outlier_multiple: float = Field(5.0, gt=0, description="an outlier is this many times the layer's mean |W|·rms(x)")
    outlier_span: float = Field(0.05, ge=0, description="how far outliers move a layer's sparsity from the mean")
    outlier_weight: float = Field(0.1, ge=0, description="weight of a unit's peak beside its mean energy; 0 is off")
    selection: Literal["qp", "score"] = Field("qp", description="choose units together, or each by its own score")
    attention: bool = Field(True, description="KV groups and query heads may go, not only FFN neurons")
    query_heads: bool = Field(True, description="single query heads may go, as many from each KV group")
    radius: float | None = Field(
        None, ge=0, description="how far the refit may move a weight, over the rms of its row; null is no limit"
    )
    damping: float = Field(0.01, gt=0, description="ridge penalty over the mean of the Gram matrix's diagonal")

    # ---------------------------------------------------------------- the dense pass

    def dense_moments(self, shape: LayerShape) -> Sequence[Moment]:
        taps = (*ATTENTION_TAPS, *FFN_TAPS)
        peaks = [Peak("attention_values"), Peak("ffn_neurons")]
        return [*map(Power, taps), *peaks, HeadGram("attention_values", shape.kv_heads)]

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The layer's share of outliers, and what its units give of their module's energy, least first.

        The heads' energy is (groups, heads per group), in the order of the groups' energy.
        """
        inputs = {
            "attention_input": (layer.query, layer.key, layer.value),
            "attention_values": (layer.output,),
            "ffn_input": (layer.gate, layer.up),
            "ffn_neurons": (layer.down,),
        }
        magnitudes = [
            projection.weight.abs() * statistics.rms(tap) for tap, group in inputs.items() for projection in group
        ]
        heads = grouped_head_interaction(layer, statistics.head_gram("attention_values", layer.kv_heads))
        outliers = sum_by_unit(self._outlier_energy(layer.output, statistics, "attention_values"), layer.query_heads)
        outliers = outliers.unflatten(0, (layer.kv_heads, -1))
        groups = heads.sum(dim=(1, 2)) + outliers.sum(dim=1)
        heads = heads.diagonal(dim1=1, dim2=2) + outliers
        neurons = column_energy(layer.down) * statistics.power("ffn_neurons")
        neurons = neurons + self._outlier_energy(layer.down, statistics, "ffn_neurons")
        # Relative to what the whole module gives: in absolute terms, modules that speak softly would all go.
        tiny = torch.finfo(neurons.dtype).tiny
        attention, ffn = groups.sum().clamp(min=tiny), neurons.sum().clamp(min=tiny)
        return {
            "outlier_ratio": outlier_ratio(magnitudes, self.outlier_multiple),
            "group_energy": groups.sort().values / attention,
            "head_energy": heads[groups.argsort()].sort(dim=1).values / attention,
            "neuron_energy": neurons.sort().values / ffn,
        }

    def _outlier_energy(self, projection: Linear, statistics: LayerStatistics, tap: str) -> Tensor:
        """What keeps a channel that is quiet on average but carries outliers, (width,).

        The energy of the channel's largest value, scaled so that it equals the mean energy for a channel whose peaks
        are of ordinary height.
        """
        power, peak = statistics.power(tap), statistics.peak(tap).square()
        # No peak is below the mean, so the ratio is at least 1 for every channel that is not silent.
        ordinary = (peak / power.clamp(min=torch.finfo(power.dtype).tiny)).median().clamp(min=1)
        return self.outlier_weight * column_energy(projection) * peak / ordinary

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        layers = range(target.config.num_hidden_layers)
        fill_with_ffn(target, [self._smallest(target.config.layer_shape(index)) for index in layers], align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        ratios = torch.stack([profile["outlier_ratio"] for profile in profiles])
        sparsities = outlier_weighted(target.decoder_sparsity, ratios, self.outlier_span).tolist()
        shapes, wanted = [], []
        for index, (shape, sparsity) in enumerate(zip(dense, sparsities, strict=True)):
            shape, neurons = self._divide(target, index, shape, sparsity, profiles[index], align)
            shapes.append(shape)
            wanted.append(neurons)
        return Plan(fill_with_ffn(target, shapes, align, wanted))

    def _divide(
        self, target: Target, index: int, shape: LayerShape, sparsity: float, profile: Profile, align: int
    ) -> tuple[LayerShape, float]:
        """Divide a layer's budget between heads and neurons: as many heads go as makes the lost energy least,
        attention's and the FFN's each as a share of the module's own.

        Returns:
            The shape with the heads that stay, and how many neurons it may keep.
        """
        config, options = target.config, []
        budget = (1 - sparsity) * layer_parameters(config, index, shape)
        lost = torch.cat([torch.zeros(1), profile["neuron_energy"].cumsum(0)])
        for smaller, energy in self._attention_options(shape, profile):
            neurons = min(shape.ffn_width, affordable_neurons(config, index, smaller, budget))
            if neurons >= align:
                options.append((energy + lost[round(shape.ffn_width - neurons)].item(), neurons, smaller))
        if not options:
            return self._smallest(shape), float(align)
        _, neurons, smaller = min(options, key=lambda option: option[:2])
        return smaller, neurons

    def _attention_options(self, shape: LayerShape, profile: Profile) -> Iterator[tuple[LayerShape, float]]:
        """What attention may become, and the energy that is lost by it."""
        groups, heads = profile["group_energy"], profile["head_energy"]
        smallest = self._smallest(shape)
        for kv_heads in range(smallest.kv_heads, shape.kv_heads + 1):
            gone = shape.kv_heads - kv_heads
            for per_group in range(smallest.query_heads // smallest.kv_heads, heads.shape[1] + 1):
                energy = groups[:gone].sum() + heads[gone:, : heads.shape[1] - per_group].sum()
                yield with_heads(shape, kv_heads, per_group), energy.item()

    def _smallest(self, shape: LayerShape) -> LayerShape:
        """The shape with as few heads as the method may leave."""
        per_group = shape.query_heads // shape.kv_heads
        groups = 1 if self.attention else shape.kv_heads
        return with_heads(shape, groups, 1 if self.attention and self.query_heads else per_group)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        moments: list[Moment] = []
        for tap, pruned in (
            ("attention_values", planned.query_heads < dense.query_heads),
            ("ffn_neurons", planned.ffn_width < dense.ffn_width),
        ):
            moments += [Gram(tap), Power(tap), Peak(tap)] if pruned else []
        return moments

    def prune(
        self,
        layer: DecoderLayer,
        planned: LayerShape,
        statistics: LayerStatistics,
        profile: Profile,
        observe: Observe,
    ) -> DecoderLayer:
        if planned.query_heads < layer.query_heads:
            layer = self._prune_heads(layer, planned, statistics)
        if planned.ffn_width < layer.shape.ffn_width:
            layer = self._prune_neurons(layer, planned, statistics)
        return layer

    def _prune_heads(self, layer: DecoderLayer, planned: LayerShape, statistics: LayerStatistics) -> DecoderLayer:
        """Choose KV groups, then heads in those that stay, and refit the output projection."""
        gram = statistics.gram("attention_values")
        outliers = self._outlier_energy(layer.output, statistics, "attention_values")
        interaction = head_interaction(layer, gram) + sum_by_unit(outliers, layer.query_heads).diag()
        heads = self._select_heads(interaction, layer.shape, planned)
        kept = channels_of(heads, layer.shape.value_dim)
        return replace(keep_heads(layer, heads), output=self._refit(layer.output, kept, gram))

    def _select_heads(self, interaction: Tensor, dense: LayerShape, planned: LayerShape) -> Tensor:
        """The query heads to keep, (groups, heads per group), from E⟨c_u, c_v⟩ of all heads, (h, h)."""
        groups, per_group = dense.kv_heads, planned.query_heads // planned.kv_heads
        by_group = interaction.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).sum(dim=(1, 3))
        kept = most_important(self._worth(by_group, planned.kv_heads, "KV groups"), planned.kv_heads)
        heads = heads_of_groups(kept, dense.query_heads // groups)
        among = interaction[heads.flatten()][:, heads.flatten()]
        worth = self._worth(among, planned.query_heads, "query heads").view_as(heads)
        return heads.gather(1, most_important(worth, per_group))

    def _prune_neurons(self, layer: DecoderLayer, planned: LayerShape, statistics: LayerStatistics) -> DecoderLayer:
        gram = statistics.gram("ffn_neurons")
        interaction = neuron_interaction(layer, gram)
        interaction.diagonal().add_(self._outlier_energy(layer.down, statistics, "ffn_neurons"))
        kept = most_important(self._worth(interaction, planned.ffn_width, "FFN neurons"), planned.ffn_width)
        return replace(keep_neurons(layer, kept), down=self._refit(layer.down, kept, gram))

    def _worth(self, interaction: Tensor, keep: int, units: str) -> Tensor:
        """What each unit is worth: its own energy, or m of min ½(1-m)ᵀQ(1-m) over 0 ≤ m ≤ 1, Σm ≤ keep."""
        score = interaction.diagonal()
        # In a module that does nothing, all units are worth the same.
        if self.selection == "score" or keep == len(score) or not score.any():
            return score
        # Scaled, so that the solver's tolerance means the same for every layer.
        solution = relaxed_selection(interaction / score.mean(), torch.ones_like(score), float(keep))
        warn_unless_converged(solution, f"the choice of {units}")
        return solution.x[0]

    def _refit(self, projection: Linear, kept: Tensor, gram: Tensor) -> Linear:
        """QP reconstruction: the projection from the ``kept`` channels that gives the dense output back best."""
        weight = projection.weight.float()
        start = weight[:, kept]
        radius = inf if self.radius is None else self.radius * weight.square().mean(dim=1, keepdim=True).sqrt()
        solution = box_ridge(gram[kept][:, kept], weight @ gram[:, kept], start, radius, self.damping)
        warn_unless_converged(solution, f"the refit from {len(kept)} channels")
        return Linear(solution.x, projection.bias)


def grouped_head_interaction(layer: DecoderLayer, group_gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of the query heads of each KV group, (g, m, m), from the groups' moments alone, (g, m·v, m·v)."""
    per_group = layer.query_heads // layer.kv_heads
    weights = layer.output.weight.float().unflatten(1, (layer.kv_heads, per_group, -1)).permute(1, 2, 0, 3)
    blocks = group_gram.unflatten(1, (per_group, -1)).unflatten(3, (per_group, -1))
    return torch.einsum("gudi,guivj,gvdj->guv", weights, blocks, weights)


def warn_unless_converged(solution: QuadraticSolution, what: str) -> None:
    """The solution is feasible and no worse than its start either way, so it is used; the run's record tells."""
    rows = int((~solution.converged).sum())
    if rows:
        warnings.warn(
            f"{what}: the quadratic program of {rows} of {len(solution.x)} rows stopped after {solution.iterations} "
            f"iterations with a KKT residual of {solution.kkt_residual.max():.1e}",
            ConvergenceWarning,
            stacklevel=2,
        )
