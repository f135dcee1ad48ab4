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

from distprune.budgets import Target, affordable_neurons, fill_with_ffn, outlier_ratio, outlier_weighted
from distprune.errors import ConvergenceWarning
from distprune.layers.parts import Attention, DecoderLayer, FeedForward, Linear
from distprune.layers.shapes import AttentionShape, LayerShape
from distprune.layers.sites import ATTENDED, ATTENTION_INPUT, FFN_INPUT, NEURONS, Site
from distprune.methods.base import LayerToPrune, Method, Paper, Plan, Profile, of_parts
from distprune.methods.even_layers import with_heads
from distprune.methods.networks import each_network, profile_each, prune_each
from distprune.methods.units import (
    column_energy,
    head_interaction,
    heads_of_groups,
    keep_heads,
    keep_neurons,
    neuron_interaction,
    output_slices,
    sum_by_unit,
)
from distprune.solvers import QuadraticSolution, box_ridge, channels_of, most_important, relaxed_selection
from distprune.statistics import Gram, HeadGram, LayerStatistics, Moment, Peak, Power

#: Iterations of a quadratic program that chooses units, of at most 2000, as they are on average.
PROGRAM_ITERATIONS = 100


class Oops(Method):
    """Chooses units together, by quadratic programs, and refits the output projections."""

    name: ClassVar[str] = "oops"
    paper: ClassVar[Paper | None] = Paper(
        "OOPS: outlier-aware unit selection and quadratic-programming reconstruction (Wei et al., Neural Networks 2026)"
    )
    layouts: ClassVar[tuple[str, ...]] = ("free", "heterogeneous")

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
        attention = [Power(ATTENTION_INPUT), Power(ATTENDED), Peak(ATTENDED)]
        if shape.attention:
            attention.append(HeadGram(ATTENDED, shape.attention.kv_heads))
        return of_parts(shape, attention=attention, ffn=[Power(FFN_INPUT), Power(NEURONS), Peak(NEURONS)])

    def profile(self, layer: DecoderLayer, statistics: LayerStatistics) -> Profile:
        """The layer's share of outliers, and what its units give of their module's energy, least first.

        The heads' energy is (groups, heads per group), in the order of the groups' energy.
        """
        # Relative to what the whole module gives: in absolute terms, modules that speak softly would all go.
        profile: dict[str, Tensor] = {}
        inputs: dict[Site, tuple[Linear, ...]] = {}
        attention = layer.attention
        if attention and not attention.shape.is_factored:
            inputs[ATTENTION_INPUT] = attention.query, attention.key, attention.value
            inputs[ATTENDED] = (attention.output,)
            groups, heads = self._head_energy(attention, statistics)
            whole = groups.sum().clamp(min=torch.finfo(groups.dtype).tiny)
            profile["group_energy"] = groups.sort().values / whole
            profile["head_energy"] = heads[groups.argsort()].sort(dim=1).values / whole
        magnitudes = [magnitude(each, statistics, site) for site, group in inputs.items() for each in group]
        if layer.ffn:
            profile |= profile_each(layer.ffn, statistics, self._profile_ffn)
            for ffn, own in each_network(layer.ffn, statistics):
                if own.tokens(NEURONS):
                    magnitudes += [magnitude(each, own, FFN_INPUT) for each in ffn.inputs]
                    magnitudes.append(magnitude(ffn.down, own, NEURONS))
        outliers = outlier_ratio(magnitudes, self.outlier_multiple) if magnitudes else torch.tensor(0.0)
        return profile | {"outlier_ratio": outliers}

    def _profile_ffn(self, ffn: FeedForward, statistics: LayerStatistics) -> Profile:
        neurons = column_energy(ffn.down) * statistics.power(NEURONS)
        neurons = neurons + self._outlier_energy(ffn.down, statistics, NEURONS)
        return {"neuron_energy": neurons.sort().values / neurons.sum().clamp(min=torch.finfo(neurons.dtype).tiny)}

    def _head_energy(self, attention: Attention, statistics: LayerStatistics) -> tuple[Tensor, Tensor]:
        """What the KV groups give, (g,), and each of their heads alone, (g, m), with what outliers add."""
        heads = grouped_head_interaction(attention, statistics.head_gram(ATTENDED, attention.kv_heads))
        outliers = sum_by_unit(self._outlier_energy(attention.output, statistics, ATTENDED), attention.query_heads)
        outliers = outliers.unflatten(0, (attention.kv_heads, -1))
        return heads.sum(dim=(1, 2)) + outliers.sum(dim=1), heads.diagonal(dim1=1, dim2=2) + outliers

    def even_profile(self, shape: LayerShape) -> Profile:
        """Every unit a share of its module's energy that grows linearly from the least to the greatest."""

        def shares(units: int) -> Tensor:
            rising = torch.arange(1, units + 1).float()
            return rising / rising.sum()

        profile = {"outlier_ratio": torch.tensor(0.0)}
        if attention := shape.attention:
            profile["group_energy"] = shares(attention.kv_heads)
            profile["head_energy"] = shares(attention.query_heads).unflatten(0, (attention.kv_heads, -1))
        return profile | ({"neuron_energy": shares(shape.ffn.width)} if shape.ffn else {})

    def _outlier_energy(self, projection: Linear, statistics: LayerStatistics, site: Site) -> Tensor:
        """What keeps a channel that is quiet on average but carries outliers, (width,).

        The energy of the channel's largest value, scaled so that it equals the mean energy for a channel whose peaks
        are of ordinary height.
        """
        power, peak = statistics.power(site), statistics.peak(site).square()
        # No peak is below the mean, so the ratio is at least 1 for every channel that is not silent.
        ordinary = (peak / power.clamp(min=torch.finfo(power.dtype).tiny)).median().clamp(min=1)
        return self.outlier_weight * column_energy(projection) * peak / ordinary

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        super().check_target(target, align)
        fill_with_ffn(target, [self._smallest(target, index) for index in range(target.model.num_layers)], align)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        dense = target.dense_shapes
        if target.sparsity == 0:
            return Plan(dense)
        ratios = torch.stack([profile["outlier_ratio"] for profile in profiles])
        sparsities = outlier_weighted(target.decoder_sparsity, ratios, self.outlier_span).tolist()
        divided = [
            self._divide(target, index, sparsity, profile, align)
            for index, (sparsity, profile) in enumerate(zip(sparsities, profiles, strict=True))
        ]
        return Plan(fill_with_ffn(target, [shape for shape, _ in divided], align, [neurons for _, neurons in divided]))

    def _divide(
        self, target: Target, index: int, sparsity: float, profile: Profile, align: int
    ) -> tuple[LayerShape, float]:
        """Divide a layer's budget between heads and neurons: as many heads go as makes the lost energy least,
        attention's and the FFN's each as a share of the module's own.

        Returns:
            The shape with the heads that stay, and how many neurons it may keep.
        """
        shape, options = target.dense_shape(index), []
        budget = (1 - sparsity) * target.layer_amount(index, shape)
        if not target.removable(index).neurons:
            fitting = [option for option in self._attention_options(target, index, profile)
                       if target.layer_amount(index, option[0]) <= budget]  # fmt: skip
            return min(fitting, key=lambda option: option[1], default=(self._smallest(target, index), 0))[0], 1.0
        lost = torch.cat([torch.zeros(1), profile["neuron_energy"].cumsum(0)])
        for smaller, energy in self._attention_options(target, index, profile):
            neurons = min(shape.ffn.width, affordable_neurons(target, index, smaller, budget))
            if neurons >= align:
                options.append((energy + lost[round(shape.ffn.width - neurons)].item(), neurons, smaller))
        if not options:
            return self._smallest(target, index), float(align)
        _, neurons, smaller = min(options, key=lambda option: option[:2])
        return smaller, neurons

    def _attention_options(self, target: Target, index: int, profile: Profile) -> Iterator[tuple[LayerShape, float]]:
        """What attention may become, and the energy that is lost by it."""
        shape, smallest = target.dense_shape(index), self._smallest(target, index)
        if smallest == shape:
            yield shape, 0.0
            return
        groups, heads, least = profile["group_energy"], profile["head_energy"], smallest.attention
        for kv_heads in range(least.kv_heads, shape.attention.kv_heads + 1):
            gone = shape.attention.kv_heads - kv_heads
            for per_group in range(least.heads_per_group, heads.shape[1] + 1):
                energy = groups[:gone].sum() + heads[gone:, : heads.shape[1] - per_group].sum()
                yield with_heads(shape, kv_heads, per_group), energy.item()

    def _smallest(self, target: Target, index: int) -> LayerShape:
        """The shape with as few heads as the method may leave."""
        shape = target.dense_shape(index)
        if not (self.attention and target.removable(index).heads):
            return shape
        return with_heads(shape, 1, 1 if self.query_heads else shape.attention.heads_per_group)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        def needed(site: Site) -> list[Moment]:
            return [Gram(site), Power(site), Peak(site)]

        return of_parts(
            dense,
            attention=needed(ATTENDED) if planned.attention != dense.attention else [],
            ffn=needed(NEURONS) if planned.ffn != dense.ffn else [],
        )

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        layer, planned = given.layer, given.planned
        attention = layer.attention
        if attention and planned.attention != attention.shape:
            attention = self._prune_heads(attention, planned.attention, given.statistics)
        return prune_each(given, attention, self._prune_ffn)

    def _prune_heads(self, attention: Attention, planned: AttentionShape, statistics: LayerStatistics) -> Attention:
        """Choose KV groups, then heads in those that stay, and refit the output projection."""
        gram = statistics.gram(ATTENDED)
        outliers = self._outlier_energy(attention.output, statistics, ATTENDED)
        interaction = head_interaction(attention, gram) + sum_by_unit(outliers, attention.query_heads).diag()
        heads = self._select_heads(interaction, attention.shape, planned)
        kept = channels_of(heads, planned.value_dim)
        return replace(keep_heads(attention, heads), output=self._refit(attention.output, kept, gram))

    def _select_heads(self, interaction: Tensor, dense: AttentionShape, planned: AttentionShape) -> Tensor:
        """The query heads to keep, (groups, heads per group), from E⟨c_u, c_v⟩ of all heads, (h, h)."""
        groups = dense.kv_heads
        by_group = interaction.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).sum(dim=(1, 3))
        kept = most_important(self._worth(by_group, planned.kv_heads, "KV groups"), planned.kv_heads)
        heads = heads_of_groups(kept, dense.heads_per_group)
        among = interaction[heads.flatten()][:, heads.flatten()]
        worth = self._worth(among, planned.query_heads, "query heads").view_as(heads)
        return heads.gather(1, most_important(worth, planned.heads_per_group))

    def _prune_ffn(self, given: LayerToPrune) -> FeedForward:
        ffn, statistics, keep = given.layer.ffn, given.statistics, given.planned.ffn.width
        gram = statistics.gram(NEURONS)
        interaction = neuron_interaction(ffn, gram)
        interaction.diagonal().add_(self._outlier_energy(ffn.down, statistics, NEURONS))
        kept = most_important(self._worth(interaction, keep, "FFN neurons"), keep)
        return replace(keep_neurons(ffn, kept), down=self._refit(ffn.down, kept, gram))

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

    # ---------------------------------------------------------------- what it takes


def magnitude(projection: Linear, statistics: LayerStatistics, site: Site) -> Tensor:
    """|W|·rms(x) of a projection, whose inputs are at ``site``."""
    return projection.weight.abs() * statistics.rms(site)


def grouped_head_interaction(attention: Attention, group_gram: Tensor) -> Tensor:
    """E⟨c_u, c_v⟩ of the query heads of each KV group, (g, m, m), from the groups' moments alone, (g, m·v, m·v)."""
    blocks = group_gram.unflatten(1, (attention.shape.heads_per_group, -1))
    blocks = blocks.unflatten(3, (attention.shape.heads_per_group, -1))
    weights = output_slices(attention)
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
