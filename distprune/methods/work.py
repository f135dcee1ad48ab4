"""What solves take: operations, and the memory they need beside weights and statistics.

Each is a count of what a solver does to its largest matrices, checked against measured runs. What methods have in
common is here; the rest is said by each method's own ``solve_work``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distprune.layers.shapes import LayerShape
from distprune.layers.sites import Site
from distprune.statistics import Gram, Moment, site_widths


@dataclass(frozen=True)
class SolveWork:
    """What a solve takes.

    Attributes:
        float32, float64: floating-point operations of products, factorizations and their like.
        eigen: the same of decompositions into eigenvectors.
        passed: bytes of arrays gone over.
        workspace: bytes at the peak, beside weights and statistics.
        observations: further runs of the layer: of which shape, and for which moments.
    """

    float32: float = 0.0
    float64: float = 0.0
    eigen: float = 0.0
    passed: float = 0.0
    workspace: float = 0.0
    observations: tuple[tuple[LayerShape, Sequence[Moment]], ...] = ()

    def __add__(self, other: SolveWork) -> SolveWork:
        """One after the other: the workspace is that of the greater."""
        return SolveWork(
            self.float32 + other.float32,
            self.float64 + other.float64,
            self.eigen + other.eigen,
            self.passed + other.passed,
            max(self.workspace, other.workspace),
            self.observations + other.observations,
        )

    def beside(self, held: float) -> SolveWork:
        """The same with so many more bytes held meanwhile."""
        return replace(self, workspace=self.workspace + held) if self.workspace else self


@dataclass(frozen=True)
class Problem:
    """A layer to solve for: ``planned`` is None where its profile is asked for. The moments are those collected."""

    hidden_size: int
    dense: LayerShape
    planned: LayerShape | None
    moments: Sequence[Moment]

    def has_gram(self, site: Site) -> bool:
        """Whether the Gram matrix at the site was collected."""
        return Gram(site) in self.moments


def inverses(problem: Problem) -> SolveWork:
    """Every Gram matrix copied to float64, factored and inverted; weights gone over."""
    hidden, work = problem.hidden_size, weights_gone_over(problem)
    widths = site_widths(hidden, problem.dense)
    for width in {widths[moment.site] for moment in problem.moments if isinstance(moment, Gram)}:
        work += SolveWork(float64=width**3 + 4.0 * width**2 * hidden, workspace=16.0 * width**2 + 16.0 * width * hidden)
    return work


def weights_gone_over(problem: Problem) -> SolveWork:
    """Scores and slices: some ten passes over the layer's weights in float32, one projection of the FFN scaled or
    squared."""
    width = problem.dense.ffn.width if problem.dense.ffn else 0
    passed = 40.0 * matrix_parameters(problem.hidden_size, problem.dense)
    return SolveWork(passed=passed, workspace=8.0 * problem.hidden_size * width)


def matrix_parameters(hidden_size: int, shape: LayerShape) -> int:
    """Weights of a layer's parts that every token is multiplied with."""

    def projection(width: int, rank: int | None = None) -> int:
        return width * hidden_size if rank is None else rank * (width + hidden_size)

    total = 0
    if attention := shape.attention:
        total += projection(attention.query_heads * attention.query_key_dim, attention.query_rank)
        total += projection(attention.kv_heads * attention.query_key_dim, attention.key_rank)
        total += projection(attention.kv_heads * attention.value_dim)
        total += projection(attention.query_heads * attention.value_dim, attention.output_rank)
    if ffn := shape.ffn:
        total += (3 if ffn.is_gated else 2) * projection(ffn.width)
        total += projection(hidden_size, ffn.branch_rank) if ffn.branch_rank else 0
    return total
