"""The tasks of a layer whose experts come a chunk at a time, in their order, the first chunk standing for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from distprune.engine.worker.expert_pass_tasks import (
    BackwardExperts,
    BackwardJoined,
    ForwardExperts,
    ForwardExpertsAgain,
    ForwardJoined,
    GradientAtExperts,
    ProfileExperts,
    ProfileMixture,
    ProfileMixtureAgain,
    RouteTokens,
    RouteTokensAgain,
    Seen,
    numbers_of_chunks,
)
from distprune.engine.worker.expert_tasks import JoinExperts, PruneAround, PruneExperts
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.task import Task
from distprune.layers.chunked_pass import Routed
from distprune.layers.shapes import ExpertsShape
from distprune.statistics.layer_statistics import counted

#: Does a task, and gives its results.
Do = Callable[[Task], Any]


def forward_in_chunks(worker: LayerWorker, index: int, states: Tensor, do: Do) -> tuple[Any, Any]:
    """The dense pass. Gives the profile of what is no chunk's and that of the first chunk, where it makes them."""
    routed, before = do(RouteTokens(index, states))
    outputs, overview = do(ForwardExperts(index, 0, routed))
    all_overview = overview_of_all(worker, index, overview)
    all_outputs = of_every_chunk(outputs, routed, numbers_of_chunks(worker, index))
    _, after = do(ForwardJoined(index, states, routed, all_outputs))
    if worker.has_gradient_pass:
        return {}, {}
    of_chunk = do(ProfileExperts(index, 0, routed, [before, all_overview]))
    return do(ProfileMixture(index, [before, all_overview, after])), of_chunk


def backward_in_chunks(worker: LayerWorker, index: int, states: Tensor, do: Do) -> tuple[Any, Any]:
    """The gradient pass. Gives the profile of what is no chunk's and that of the first chunk."""
    gradient = torch.empty_like(states, dtype=worker.runner.gradient_dtype)
    routed, _ = do(RouteTokensAgain(index, states))
    outputs, overview = do(ForwardExpertsAgain(index, 0, routed))
    all_overview, chunks = overview_of_all(worker, index, overview), numbers_of_chunks(worker, index)
    all_outputs = of_every_chunk(outputs, routed, chunks)
    at_experts, totals, after = do(GradientAtExperts(index, states, gradient, routed, all_outputs))
    seen = [after, all_overview]
    of_experts, of_chunk = do(BackwardExperts(index, 0, routed, at_experts, seen))
    of_all = of_every_chunk(of_experts, routed, chunks)
    _, others = do(BackwardJoined(index, states, gradient, routed, totals, of_all))
    return do(ProfileMixtureAgain(index, [*seen, others])), of_chunk


def prune_in_chunks(worker: LayerWorker, whole: Prune, do: Do) -> None:
    """The tasks in the place of one that prunes a whole layer."""
    finished, state, routed, _ = do(PruneAround.of(whole))
    planned, chunks = whole.planned, worker.chunks(whole.index)
    if not isinstance(planned.ffn, ExpertsShape) or chunks is None:
        return
    _, outputs, _ = do(PruneExperts(whole.index, planned, whole.profile, whole.propagates, 0, routed))
    if whole.propagates:
        all_outputs = of_every_chunk(outputs, routed, chunks.numbers(planned.ffn.count))
        states, pairs = whole.hidden_states, finished.rotary_pairs
        do(JoinExperts(whole.index, states, planned, state, pairs, routed, all_outputs))


def overview_of_all(worker: LayerWorker, index: int, overview: Seen) -> Seen:
    """What is known of all experts first, of what is known of a chunk's: of each as much as of the first."""
    if not overview:
        return {}
    moments = worker.method.overview_moments(worker.architecture.dense_shape(index))
    average, tokens = overview[str(moments[0])], overview[counted(moments[0].site)]
    return {str(moment): average for moment in moments} | {counted(moment.site): tokens for moment in moments}


def of_every_chunk(given: Sequence[Any], routed: Sequence[Routed], chunks: Sequence[range]) -> list[list[Any]]:
    """What each chunk of experts gives of every micro-batch, (its tokens, ...), of what the first one has given."""

    def as_long(of_batch: Any, rows: int) -> Any:
        return tree_map(lambda tensor: tensor.new_empty(rows, *tensor.shape[1:]), of_batch)

    batches = [*zip(given, routed, strict=True)]
    return [[as_long(of_batch, len(batch.rows(own)[0])) for of_batch, batch in batches] for own in chunks]
