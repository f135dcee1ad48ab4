"""Z-Pruner: post-training pruning of large language models without retraining (2025, arXiv 2508.15828).

A weight is worth how far it lies from the others of its matrix, in standard deviations, times the size of its input:
once after every row is scaled to norm 1 and once after every column is, in the mix and with the powers of the published
code.

As published it sets single weights to zero, layer after layer, and updates none: ``mode=unstructured`` does that, with
``pattern`` in groups of N:M. Then no matrix becomes smaller. By default the scores are summed over the units of
structured pruning, the weights that go together, and whole units leave: a variant that the paper doesn't have.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from distprune.budgets import Target
from distprune.errors import InputError
from distprune.layers.parts import Attention, DecoderLayer, FeedForward, Linear
from distprune.layers.shapes import LayerShape
from distprune.layers.sites import ATTENDED, ATTENTION_INPUT, FFN_INPUT, NEURONS, Site
from distprune.methods.base import LayerToPrune, Paper, Plan, Profile, of_parts
from distprune.methods.networks import change_each
from distprune.methods.scored_units import ScoredUnits
from distprune.methods.units import sum_by_unit
from distprune.methods.zeroing import zero_in_groups, zero_least
from distprune.statistics import LayerStatistics, Moment, Power

# The published code's: the powers of a standard score and of an input's rms, how much the scaled rows count against the
# scaled columns, by how much less where all weights are small, and below which multiple of the mean one is small.
SCORE_POWER, INPUT_POWER, ROW_SHARE, SMALL_SHARE, SMALL = 3, 1.5, 0.7, 0.3, 0.1
PATTERN = re.compile(r"([1-9]\d*):([1-9]\d*)")


class ZPruner(ScoredUnits):
    """Removes the units, or zeroes the weights, of the smallest standard scores times their inputs."""

    name: ClassVar[str] = "z-pruner"
    paper: ClassVar[Paper | None] = Paper(
        "Z-Pruner: Post-Training Pruning of Large Language Models for Efficiency without Retraining (AICCSA 2025)",
        "2508.15828",
    )

    mode: Literal["structured", "unstructured"] = Field(
        "structured", description="structured removes units, unstructured sets single weights to zero"
    )
    pattern: str | None = Field(
        None, description="N:M leaves at most N of M neighbouring inputs' weights; for mode=unstructured"
    )

    @field_validator("pattern", mode="before")
    @classmethod
    def _as_written(cls, pattern: object) -> object:
        """YAML reads 2:4 as a number to the base 60."""
        return "{}:{}".format(*divmod(pattern, 60)) if type(pattern) is int else pattern

    @field_validator("pattern")
    @classmethod
    def _is_pattern(cls, pattern: str | None, info: ValidationInfo) -> str | None:
        if pattern is None:
            return None
        if info.data.get("mode") != "unstructured":
            raise ValueError("only mode=unstructured has patterns")
        numbers = PATTERN.fullmatch(pattern)
        if not numbers or int(numbers[1]) >= int(numbers[2]):
            raise ValueError("give N:M with N smaller than M, such as 2:4")
        return pattern

    @property
    def zeroes(self) -> bool:
        return self.mode == "unstructured"

    @property
    def kept_of_group(self) -> tuple[int, int] | None:
        """N and M of the pattern."""
        if self.pattern is None:
            return None
        kept, group = map(int, self.pattern.split(":"))
        return kept, group

    # ---------------------------------------------------------------- the budget

    def check_target(self, target: Target, align: int) -> None:
        if not self.zeroes:
            super().check_target(target, align)
            return
        self.check_resource(target)
        if target.count_embeddings:
            raise InputError(
                f"--count-embeddings: method {self.name} with mode=unstructured zeroes weights of the decoder layers "
                "alone, and --sparsity is the fraction of those. Leave it out."
            )
        if self.kept_of_group and target.sparsity:
            check_pattern(*self.kept_of_group, target)

    def plan(self, target: Target, profiles: Sequence[Profile], align: int) -> Plan:
        return Plan(target.dense_shapes) if self.zeroes else super().plan(target, profiles, align)

    # ---------------------------------------------------------------- the pruning pass

    def pruning_moments(self, dense: LayerShape, planned: LayerShape) -> Sequence[Moment]:
        return of_parts(
            dense,
            attention=[Power(ATTENTION_INPUT), Power(ATTENDED)],
            ffn=[Power(FFN_INPUT), Power(NEURONS)],
        )

    def carried_moments(self, shape: LayerShape) -> Sequence[Moment]:
        return self.pruning_moments(shape, shape)

    def score_groups(self, attention: Attention, statistics: LayerStatistics) -> Tensor:
        """The scores of a KV group's query, key and value rows and output columns."""
        scores = partial(score_weights, statistics=statistics)
        rows = [
            scores(projection, given=ATTENTION_INPUT).sum(dim=1)
            for projection in (attention.query, attention.key, attention.value)
        ]
        columns = scores(attention.output, given=ATTENDED).sum(dim=0)
        return sum(sum_by_unit(channels, attention.kv_heads) for channels in (*rows, columns))

    def score_neurons(self, ffn: FeedForward, statistics: LayerStatistics) -> Tensor:
        """The scores of a neuron's rows in gate and up, and of its column in down."""
        rows = [score_weights(projection, statistics, FFN_INPUT).sum(dim=1) for projection in ffn.inputs]
        return sum(rows) + score_weights(ffn.down, statistics, NEURONS).sum(dim=0)

    def prune(self, given: LayerToPrune) -> DecoderLayer:
        if not self.zeroes:
            return super().prune(given)
        attention = given.layer.attention
        # Where some of the experts are here, attention's weights are not: another task zeroes them.
        if attention and not attention.shape.is_factored and not attention.query.weight.is_meta:
            attention = self._zero_attention(attention, given)
        return change_each(given, attention, self._zero_ffn)

    def _zero_attention(self, attention: Attention, given: LayerToPrune) -> Attention:
        zeroed = partial(self._zeroed, given=given)
        return replace(
            attention,
            query=zeroed(attention.query, ATTENTION_INPUT),
            key=zeroed(attention.key, ATTENTION_INPUT),
            value=zeroed(attention.value, ATTENTION_INPUT),
            output=zeroed(attention.output, ATTENDED),
        )

    def _zero_ffn(self, given: LayerToPrune) -> FeedForward:
        ffn, zeroed = given.layer.ffn, partial(self._zeroed, given=given)
        return replace(
            ffn,
            gate=ffn.gate and zeroed(ffn.gate, FFN_INPUT),
            up=zeroed(ffn.up, FFN_INPUT),
            down=zeroed(ffn.down, NEURONS),
        )

    def _zeroed(self, linear: Linear, site: Site, given: LayerToPrune) -> Linear:
        if not given.sparsity:
            return linear
        scores = score_weights(linear, given.statistics, site)
        if self.kept_of_group:
            return zero_in_groups(linear, scores, *self.kept_of_group)
        return zero_least(linear, scores, given.sparsity)


def score_weights(projection: Linear, statistics: LayerStatistics, given: Site) -> Tensor:
    """What each weight of the projection is worth, (out, in)."""
    return standard_scores(projection.weight.float()).mul_(statistics.rms(given).pow(INPUT_POWER))


def standard_scores(weight: Tensor) -> Tensor:
    """How far each weight lies from the others, (out, in): with its row at norm 1, and with its column at norm 1."""
    size = weight.abs()
    small = (size < SMALL * size.mean()).float().mean()
    row_share = ROW_SHARE * (1 - SMALL_SHARE * small)
    return cubed_deviations(weight, 1).mul_(row_share).add_(cubed_deviations(weight, 0).mul_(1 - row_share))


def cubed_deviations(weight: Tensor, dim: int) -> Tensor:
    """|z|³ of the standard scores z in the whole matrix, once its rows (1) or columns (0) are at norm 1."""
    tiny = torch.finfo(weight.dtype).tiny
    scaled = weight / torch.linalg.vector_norm(weight, dim=dim, keepdim=True).clamp(min=tiny)
    mean, deviation = scaled.mean(), scaled.std().clamp(min=tiny)
    return scaled.sub_(mean).div_(deviation).abs_().pow_(SCORE_POWER)


def check_pattern(kept: int, group: int, target: Target) -> None:
    """See that a pattern N:M fits the sparsity and the model.

    Raises:
        InputError: it does not.
    """
    fraction = 1 - kept / group
    if abs(target.sparsity - fraction) > 1e-6:
        raise InputError(
            f"--sparsity {target.sparsity:g}: pattern={kept}:{group} zeroes {fraction:.4g} of the weights. Give "
            f"--sparsity {fraction:.4g}, or another pattern."
        )
    for shape in target.dense_shapes:
        widths = {target.model.hidden_size}
        if shape.attention and not shape.attention.is_factored:
            widths.add(shape.attention.query_heads * shape.attention.value_dim)
        if shape.ffn:
            shared = getattr(shape.ffn, "shared", None)
            widths |= {shape.ffn.width, *({shared.width} if shared else ())}
        for width in widths:
            if width % group:
                raise InputError(
                    f"pattern={kept}:{group}: a projection of the model has {width} inputs, no multiple of {group}. "
                    "Give another pattern, or leave it out."
                )
