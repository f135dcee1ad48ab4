"""What the methods' solves cost: operations, and the memory they need beside weights and statistics.

Each is a count of what its solver does to its largest matrices, checked against measured runs. A method that has no
entry is taken to factor and invert each of its Gram matrices once in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil

from distprune.decoder_layer import LayerShape
from distprune.methods.curvature.curves import BRANCH_SHARES, STEPS
from distprune.methods.olica import LINEAR_FIT
from distprune.planning.work import Work, matrix_parameters, moment_size, tap_widths
from distprune.solvers.subspace import ITERATIONS, SPARE, is_few
from distprune.statistics import Cross, Gram, Moment

# Iterations of a quadratic program that chooses units, of at most 2000.
PROGRAM_ITERATIONS = 100


@dataclass(frozen=True)
class Solve:
    """``workspace`` is in bytes; ``observations`` are further runs: of which shape, and for
    which moments."""

    work: Work
    workspace: float
    observations: tuple[tuple[LayerShape, Sequence[Moment]], ...] = ()


@dataclass(frozen=True)
class Problem:
    """A layer that is to be pruned, with the moments that were collected for it; ``planned`` None in the dense pass."""

    hidden: int
    dense: LayerShape
    planned: LayerShape | None
    moments: Sequence[Moment]

    @property
    def parameters(self) -> int:
        return matrix_parameters(self.dense, self.hidden)

    def has_gram(self, tap: str) -> bool:
        return Gram(tap) in self.moments

    def sizes(self) -> list[int]:
        """Numbers that each matrix among the moments holds."""
        widths = tap_widths(self.dense, self.hidden)
        return [moment_size(moment, widths) for moment in self.moments if isinstance(moment, Gram | Cross)]


def solve_of(method: str, problem: Problem) -> Solve:
    """The solve of a layer: profile where nothing is planned yet, and pruning where it is."""
    if problem.planned == problem.dense:
        return Solve(Work(), 0)
    return SOLVES.get(method, _inverses)(problem)


def _inverses(problem: Problem) -> Solve:
    """Every Gram matrix copied to float64, factored and inverted; weights gone over."""
    hidden, work, workspace = problem.hidden, _weights_gone_over(problem), _scores_workspace(problem)
    widths = tap_widths(problem.dense, hidden)
    for width in {widths[moment.tap] for moment in problem.moments if isinstance(moment, Gram)}:
        work += Work(solve_float64=width**3 + 4.0 * width**2 * hidden)
        workspace = max(workspace, 16.0 * width**2 + 16.0 * width * hidden)
    return Solve(work, workspace)


def _weights_gone_over(problem: Problem) -> Work:
    """Scores and slices: some ten passes over the layer's weights in float32."""
    return Work(passed_in_solves=40.0 * problem.parameters)


def _scores_workspace(problem: Problem) -> float:
    """One projection of the FFN in float32, scaled or squared."""
    return 8.0 * problem.hidden * problem.dense.ffn_width


# ---------------------------------------------------------------- curvature


def _curvature(problem: Problem) -> Solve:
    return _curvature_profile(problem) if problem.planned is None else _curvature_prune(problem)


def _curvature_profile(problem: Problem) -> Solve:
    """Every output projection in its metric, and the order in which its inputs go; the values' rotations; factors."""
    hidden, dense = problem.hidden, problem.dense
    values, per_group = dense.query_heads * dense.value_dim, dense.query_heads // dense.kv_heads
    rotations = Work(
        solve_float64=dense.kv_heads * (2.0 * per_group * hidden + 6.0 * dense.value_dim) * dense.value_dim**2,
        eigen=9.0 * dense.kv_heads * dense.value_dim**3,
    )
    work, workspace, left = rotations, 0.0, 0.0
    if problem.has_gram("query_gradient"):
        queries, keys = (heads * dense.query_key_dim for heads in (dense.query_heads, dense.kv_heads))
        for out, inputs in ((queries, hidden), (keys, hidden), (hidden, values)):
            work += _truncation(out, inputs)
            workspace = max(workspace, left + _truncation_workspace(out, inputs))
            left += 8.0 * out * (out * inputs // (out + inputs))
    for width, units in ((values, dense.kv_heads), (dense.ffn_width, min(dense.ffn_width, STEPS))):
        work += _elimination_path(width, hidden, units)
        workspace = max(workspace, left + _elimination_path_workspace(width, hidden))
    if problem.has_gram("ffn_input"):
        for kept in (ceil(share * dense.ffn_width) for share in BRANCH_SHARES):
            work += _branch(kept, dense.ffn_width, hidden) + _truncation_errors(hidden)
            truncating = 16.0 * hidden**2 + _truncation_workspace(hidden, hidden)
            workspace = max(workspace, left + max(_branch_workspace(kept, dense.ffn_width, hidden), truncating))
    return Solve(work, workspace)


def _branch(kept: int, width: int, hidden: int) -> Work:
    """The kept neurons' Gram matrix factored, what it tells of the input and of what is gone, and of the former the
    rest, which the branch is regressed on."""
    kept_alone = kept**3 / 3 + 2.0 * kept**2 * hidden
    products = 2.0 * (width - kept) * hidden * (kept + hidden) + 4.0 * kept * hidden**2
    return Work(solve_float64=kept_alone + products + 7 / 3 * hidden**3)


def _branch_workspace(kept: int, width: int, hidden: int) -> float:
    """In float64 all that :func:`_branch` says, one after another, and the metric's root."""
    return 8.0 * (kept**2 + kept * (width - kept) + (width + 2 * kept) * hidden + 4 * hidden**2) + 4.0 * width * hidden


def _elimination_path(width: int, hidden: int, steps: int) -> Work:
    """A metric's root, the weight in it, the inverse of the Gram matrix, and what leaves it in so many steps."""
    metric = hidden**3 / 3 + 2.0 * hidden**2 * width
    updates = 2 / 3 * width**3 + hidden * width**2
    return Work(solve_float64=metric + width**3 + updates, passed_in_solves=steps * 8.0 * width**2)


def _elimination_path_workspace(width: int, hidden: int) -> float:
    """The root, the weight in the metric and as it was and becomes, and two inverses, all but one of it in float64."""
    return 8.0 * hidden**2 + 20.0 * width * hidden + 16.0 * width**2


def _truncation(out: int, inputs: int) -> Work:
    """A root, the projection in both metrics, its left singular vectors, and what they are outside the metric."""
    products = 4.0 * out**2 * inputs + 2.0 * out * inputs**2
    return Work(solve_float64=products + (1 / 3 + 5.0) * out**3, eigen=9.0 * out**3)


def _truncation_errors(width: int) -> Work:
    """A square map in both metrics, and its eigenvalues alone."""
    return Work(solve_float64=6.0 * width**3, eigen=4 / 3 * width**3)


def _truncation_workspace(out: int, inputs: int) -> float:
    """The root, the damped Gram matrix, and it and the projection in float64; or eigenvectors and LAPACK's own."""
    return (
        8.0 * out**2 + 4.0 * inputs**2 + max(8.0 * inputs**2 + 24.0 * out * inputs, 8.0 * out * inputs + 40.0 * out**2)
    )


def _curvature_prune(problem: Problem) -> Solve:
    """Slices and refits, each on what is seen of the layer as it then is."""
    hidden, dense, planned = problem.hidden, problem.dense, problem.planned
    values, left = dense.query_heads * dense.value_dim, planned.query_heads * planned.value_dim
    work, workspace, attention, observations = _weights_gone_over(problem), 0.0, 0.0, []
    if 0 < left < values:
        work += _ridge_towards(left, values, hidden)
        # The values' and the output projection, rotated, and what is left of them, in float32.
        attention = 4.0 * hidden * (left + planned.kv_heads * planned.value_dim)
        rotated = 4.0 * hidden * (values + dense.kv_heads * dense.value_dim)
        workspace = rotated + attention + _ridge_towards_workspace(left, values, hidden)
        observations.append((replace(dense, ffn_width=0, down_bias=False), [Gram("attention_values")]))
    if 0 < planned.ffn_width < dense.ffn_width:
        work += _ridge_towards(planned.ffn_width, dense.ffn_width, hidden)
        refit = 4.0 * hidden * dense.ffn_width + _ridge_towards_workspace(planned.ffn_width, dense.ffn_width, hidden)
        workspace = max(workspace, attention + refit)
        ffn = replace(planned, ffn_width=dense.ffn_width, down_bias=dense.down_bias)
        observations.append((ffn, [Gram("ffn_neurons")]))
    return Solve(work, workspace, tuple(observations))


def _ridge_towards(kept: int, width: int, hidden: int) -> Work:
    """What the kept inputs lack of what all give, and the ridge regression of that."""
    products = 2.0 * hidden * kept * (width + kept)
    return Work(solve_float32=products + kept**3 / 3 + 2.0 * kept**2 * hidden)


def _ridge_towards_workspace(kept: int, width: int, hidden: int) -> float:
    """The Gram matrix with its kept columns and rows, the latter twice, and what the refit is made of, in float32."""
    return 4.0 * width**2 + 4.0 * width * kept + 8.0 * kept**2 + 16.0 * kept * hidden


# ---------------------------------------------------------------- Olica


def _olica(problem: Problem) -> Solve:
    return _olica_profile(problem) if problem.planned is None else _olica_prune(problem)


def _olica_profile(problem: Problem) -> Solve:
    """Ridge regression of the FFN's output on its input, and how well it predicts."""
    return Solve(_ridge(problem.hidden), 24.0 * problem.hidden**2) if problem.sizes() else Solve(Work(), 0)


def _ridge(width: int) -> Work:
    return Work(solve_float32=(1 / 3 + 2 + 2) * width**3)


def _olica_prune(problem: Problem) -> Solve:
    """Low-rank queries and keys, each by the eigenvectors of W Wᵀ; and the linear calibration."""
    hidden, dense, planned = problem.hidden, problem.dense, problem.planned
    queries, keys = (heads * dense.query_key_dim for heads in (dense.query_heads, dense.kv_heads))
    work = _weights_gone_over(problem) + _low_rank(queries, hidden, planned.query_rank)
    work += _low_rank(keys, hidden, planned.key_rank)
    workspace = max(_scores_workspace(problem), _low_rank_workspace(queries, hidden, planned.query_rank))
    dropped = dense.ffn_width - planned.ffn_width
    if not (planned.calibration_rank and dropped):
        return Solve(work, workspace)
    work += _ridge(hidden) + _low_rank(hidden, hidden, planned.calibration_rank)
    # Two moments of hidden states, and what comes of them.
    workspace = max(workspace, 28.0 * hidden**2, 12.0 * hidden**2 + _low_rank_workspace(hidden, hidden, 1))
    return Solve(work, workspace, ((replace(dense, ffn_width=dropped), LINEAR_FIT),))


def _low_rank(rows: int, columns: int, rank: int) -> Work:
    """By the eigenvectors of W Wᵀ, or by iterating for a few."""
    if not is_few(rank, rows, columns):
        return Work(solve_float64=2.0 * rows**2 * columns, eigen=9.0 * rows**3)
    width = rank + SPARE * min(rows, columns)
    orthonormal = 4.0 * (rows + columns) / 2 * width**2
    steps = 2 * ITERATIONS + 2
    return Work(solve_float32=steps * (2.0 * rows * columns * width + orthonormal), eigen=9.0 * width**3)


def _low_rank_workspace(rows: int, columns: int, rank: int) -> float:
    """W and W scaled in float32; and W scaled, W Wᵀ, its eigenvectors and LAPACK's own in float64, or the bases."""
    if is_few(rank, rows, columns):
        return 8.0 * rows * columns + 16.0 * (rows + columns) * (rank + SPARE * min(rows, columns))
    return 8.0 * rows * columns + max(8.0 * rows * columns + 8.0 * rows**2, 32.0 * rows**2)


# ---------------------------------------------------------------- OOPS


def _oops(problem: Problem) -> Solve:
    if problem.planned is None:
        return _oops_profile(problem)
    hidden, dense, planned = problem.hidden, problem.dense, problem.planned
    values, kept = dense.query_heads * dense.value_dim, planned.query_heads * planned.value_dim
    work, workspace = _weights_gone_over(problem), 0.0
    if problem.has_gram("attention_values"):
        work += _refit(values, kept, hidden) + Work(solve_float32=2.0 * values**2 * hidden)
        interaction = 4.0 * values * hidden * (dense.query_heads + 2) + 8.0 * values**2
        workspace = max(interaction, _refit_workspace(values, kept, hidden))
    if problem.has_gram("ffn_neurons"):
        width, kept = dense.ffn_width, planned.ffn_width
        work += _refit(width, kept, hidden) + _selection(width) + Work(solve_float32=2.0 * width**2 * hidden)
        # To choose: the interaction, the same scaled, in float32; three of the program's in float64.
        workspace = max(workspace, 32.0 * width**2, _refit_workspace(width, kept, hidden))
    return Solve(work, workspace)


def _oops_profile(problem: Problem) -> Solve:
    """Magnitudes of all weights, and how the heads of a group act together."""
    dense, hidden = problem.dense, problem.hidden
    values, per_group = dense.query_heads * dense.value_dim, dense.query_heads // dense.kv_heads
    products = Work(solve_float32=2.0 * values**2 * hidden / dense.kv_heads)
    workspace = 4.0 * problem.parameters + 4.0 * values * hidden * (per_group + 2)
    return Solve(_weights_gone_over(problem) + products, workspace)


def _selection(width: int) -> Work:
    """A quadratic program of one row: a factorization, then iterations that read the factor."""
    return Work(solve_float64=width**3 / 3, passed_in_solves=PROGRAM_ITERATIONS * 8.0 * width**2)


def _refit(width: int, kept: int, hidden: int) -> Work:
    """Ridge regression in closed form, and the residuals that show it to be the box program's solution."""
    return Work(
        solve_float32=2.0 * width * kept * hidden,
        solve_float64=kept**3 / 3 + 18.0 * kept**2 * hidden,
    )


def _refit_workspace(width: int, kept: int, hidden: int) -> float:
    """The interaction in float32; three of the program's matrices and its many rows in float64."""
    return 4.0 * width**2 + 24.0 * kept**2 + 148.0 * kept * hidden


# ---------------------------------------------------------------- SlimGPT


def _slimgpt(problem: Problem) -> Solve:
    """The inverse of a Gram matrix, from which columns leave; never more than two such matrices."""
    dense, planned, hidden = problem.dense, problem.planned or problem.dense, problem.hidden
    values, left = dense.query_heads * dense.value_dim, planned.query_heads * planned.value_dim
    work, workspace = _weights_gone_over(problem), 0.0
    for tap, width, kept in (
        ("attention_values", values, left),
        ("ffn_neurons", dense.ffn_width, planned.ffn_width),
    ):
        if problem.has_gram(tap):
            updates = 2 / 3 * (width**3 - kept**3) + hidden * (width**2 - kept**2)
            work += Work(solve_float64=width**3 + updates)
            workspace = max(workspace, 16.0 * width**2 + 16.0 * width * hidden)
    return Solve(work, workspace)


SOLVES: dict[str, Callable[[Problem], Solve]] = {
    "curvature": _curvature,
    "olica": _olica,
    "oops": _oops,
    "slimgpt": _slimgpt,
}
