"""What curvature's solves take."""

from __future__ import annotations

from dataclasses import replace
from math import ceil

from distprune.layers.shapes import AttentionShape, FeedForwardShape
from distprune.layers.sites import ATTENDED, FFN_INPUT, NEURONS, QUERIES
from distprune.methods.curvature.curves import BRANCH_SHARES, STEPS, greatest_rank
from distprune.methods.work import Problem, SolveWork, weights_gone_over
from distprune.statistics import Gram


def profile_work(problem: Problem) -> SolveWork:
    """Every output projection in its metric, and the order in which its inputs go; the values' rotations; factors."""
    hidden, work, held = problem.hidden_size, SolveWork(), 0.0
    if attention := problem.dense.attention:
        values = attention.query_heads * attention.value_dim
        work += rotations(attention, hidden)
        if problem.has_gram(QUERIES.gradient):
            queries, keys = (heads * attention.query_key_dim for heads in (attention.query_heads, attention.kv_heads))
            for out, inputs in ((queries, hidden), (keys, hidden), (hidden, values)):
                work += truncation(out, inputs).beside(held)
                held += 8.0 * out * greatest_rank(out, inputs)
        work += elimination_path(values, hidden, attention.kv_heads).beside(held)
    if ffn := problem.dense.ffn:
        work += elimination_path(ffn.width, hidden, min(ffn.width, STEPS)).beside(held)
        if problem.has_gram(FFN_INPUT):
            work += branches(ffn, hidden).beside(held)
    return work


def rotations(attention: AttentionShape, hidden: int) -> SolveWork:
    """The rotation of each group's values."""
    groups, width = attention.kv_heads, attention.value_dim
    products = groups * (2.0 * attention.heads_per_group * hidden + 6.0 * width) * width**2
    return SolveWork(float64=products, eigen=9.0 * groups * width**3)


def branches(ffn: FeedForwardShape, hidden: int) -> SolveWork:
    """Branches beside FFNs of some widths, and what truncating them loses, by their eigenvalues alone."""
    work = SolveWork()
    for kept in (ceil(share * ffn.width) for share in BRANCH_SHARES):
        work += branch(kept, ffn.width, hidden)
        work += SolveWork(
            float64=6.0 * hidden**3,
            eigen=4 / 3 * hidden**3,
            workspace=16.0 * hidden**2 + truncation(hidden, hidden).workspace,
        )
    return work


def branch(kept: int, width: int, hidden: int) -> SolveWork:
    """The kept neurons' Gram matrix factored, what it tells of the input and of what is gone, and of the former the
    rest, which the branch is regressed on. All of it is held in float64, one after another, and the metric's root."""
    kept_alone = kept**3 / 3 + 2.0 * kept**2 * hidden
    products = 2.0 * (width - kept) * hidden * (kept + hidden) + 4.0 * kept * hidden**2
    held = 8.0 * (kept**2 + kept * (width - kept) + (width + 2 * kept) * hidden + 4 * hidden**2)
    return SolveWork(float64=kept_alone + products + 7 / 3 * hidden**3, workspace=held + 4.0 * width * hidden)


def elimination_path(width: int, hidden: int, steps: int) -> SolveWork:
    """A metric's root, the weight in it, the inverse of the Gram matrix, and what leaves it in so many steps.

    It holds the root, the weight in the metric and as it was and becomes, and two inverses, all but one of it in
    float64.
    """
    metric = hidden**3 / 3 + 2.0 * hidden**2 * width
    updates = 2 / 3 * width**3 + hidden * width**2
    return SolveWork(
        float64=metric + width**3 + updates,
        passed=steps * 8.0 * width**2,
        workspace=8.0 * hidden**2 + 20.0 * width * hidden + 16.0 * width**2,
    )


def truncation(out: int, inputs: int) -> SolveWork:
    """A root, the projection in both metrics, its left singular vectors, and what they are outside the metric.

    It holds the root, the damped Gram matrix, and it and the projection in float64; or eigenvectors and LAPACK's own.
    """
    products = 4.0 * out**2 * inputs + 2.0 * out * inputs**2
    held = max(8.0 * inputs**2 + 24.0 * out * inputs, 8.0 * out * inputs + 40.0 * out**2)
    return SolveWork(
        float64=products + (1 / 3 + 5.0) * out**3,
        eigen=9.0 * out**3,
        workspace=8.0 * out**2 + 4.0 * inputs**2 + held,
    )


def pruning_work(problem: Problem) -> SolveWork:
    """Slices and refits, each on what is seen of the layer as it then is."""
    hidden, dense, planned = problem.hidden_size, problem.dense, problem.planned
    work, kept = replace(weights_gone_over(problem), workspace=0.0), 0.0
    if planned.attention and (left := value_channels(planned.attention)) < (whole := value_channels(dense.attention)):
        # The values' and the output projection, rotated, and what is left of them, in float32.
        kept = 4.0 * hidden * (left + planned.attention.kv_heads * planned.attention.value_dim)
        rotated = 4.0 * hidden * (whole + dense.attention.kv_heads * dense.attention.value_dim)
        work += ridge_towards(left, whole, hidden).beside(rotated + kept)
        work += SolveWork(observations=((replace(dense, ffn=None), [Gram(ATTENDED)]),))
    if planned.ffn and planned.ffn.width < dense.ffn.width:
        refit = ridge_towards(planned.ffn.width, dense.ffn.width, hidden)
        work += refit.beside(kept + 4.0 * hidden * dense.ffn.width)
        work += SolveWork(observations=((replace(planned, ffn=dense.ffn), [Gram(NEURONS)]),))
    return work


def value_channels(attention: AttentionShape) -> int:
    """How wide the output projection's input is."""
    return attention.query_heads * attention.value_dim


def ridge_towards(kept: int, width: int, hidden: int) -> SolveWork:
    """What the kept inputs lack of what all give, and the ridge regression of that.

    It holds the Gram matrix with its kept columns and rows, the latter twice, and what the refit is made of, in
    float32.
    """
    products = 2.0 * hidden * kept * (width + kept)
    return SolveWork(
        float32=products + kept**3 / 3 + 2.0 * kept**2 * hidden,
        workspace=4.0 * width**2 + 4.0 * width * kept + 8.0 * kept**2 + 16.0 * kept * hidden,
    )
