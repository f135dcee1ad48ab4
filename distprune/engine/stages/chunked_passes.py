"""Layers of the dense and the gradient pass whose experts come a chunk at a time, each a task for any idle worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from distprune.engine.scheduler.pool import WorkerPool
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
)
from distprune.engine.worker.host_tensor import HostTensor, joined
from distprune.engine.worker.task import Task


def submit_all(pool: WorkerPool, tasks: Iterable[Task], then: Callable[[list[Any]], None]) -> None:
    """Queue tasks; ``then`` gets the results of all, in the order of the tasks, when the last is there.

    Those of a task with several results are a tuple.
    """
    tasks, results = list(tasks), dict[int, Any]()

    def keep(number: int, *values: Any) -> None:
        results[number] = values if len(values) > 1 else values[0]
        if len(results) == len(tasks):
            then([results[number] for number in range(len(tasks))])

    for number, task in enumerate(tasks):
        pool.submit(task, partial(keep, number))


class ChunkedForward:
    """A mixture's layer in the dense pass.

    Args:
        pool: the workers.
        index: the layer.
        chunks: of its experts.
        profiles: whether this pass makes the profile.
        hidden_states: at its input, put.
        pass_on: gets its output hidden states.
        close: gets its profile, when that is there, and an empty dictionary.
    """

    def __init__(
        self,
        pool: WorkerPool,
        index: int,
        chunks: int,
        profiles: bool,
        hidden_states: Any,
        pass_on: Callable[[HostTensor], None],
        close: Callable[[Any, Any], None],
    ):
        self.pool, self.index, self.chunks, self.profiles = pool, index, range(chunks), profiles
        self.states, self.pass_on, self.close = hidden_states, pass_on, close

    def submit(self) -> None:
        """Queue the first task, and each further one as soon as what it needs is there."""
        self.pool.submit(RouteTokens(self.index, self.states), self._routed)

    def _routed(self, routed: Any, seen: Any) -> None:
        self._routing, self._seen = self.pool.put(routed), [seen]
        forward = (ForwardExperts(self.index, chunk, self._routing) for chunk in self.chunks)
        submit_all(self.pool, forward, self._forwarded)

    def _forwarded(self, chunks: list[Any]) -> None:
        outputs = self.pool.put([given for given, _ in chunks])
        self._seen += [seen for _, seen in chunks]
        self.pool.submit(ForwardJoined(self.index, self.states, self._routing, outputs), self._joined)

    def _joined(self, output: HostTensor, seen: Any) -> None:
        self.pass_on(output)
        if not self.profiles:
            self.close({}, {})
            return
        before = self.pool.put(self._seen)
        self._seen = [*self._seen, seen]
        profiling = (ProfileExperts(self.index, chunk, self._routing, before) for chunk in self.chunks)
        submit_all(self.pool, profiling, self._profiled)

    def _profiled(self, chunks: list[Any]) -> None:
        task = ProfileMixture(self.index, self.pool.put(self._seen))
        self.pool.submit(task, lambda of_layer: self.close(joined_profile(of_layer, chunks), {}))


class ChunkedBackward:
    """A mixture's layer in the gradient pass, which makes the profile.

    Args:
        pool, index, chunks, close: as of :class:`ChunkedForward`.
        hidden_states: at its input, put.
        gradient: of the loss, at its output, put.
        pass_on: gets the gradient at its input.
    """

    def __init__(
        self,
        pool: WorkerPool,
        index: int,
        chunks: int,
        hidden_states: Any,
        gradient: Any,
        pass_on: Callable[[HostTensor], None],
        close: Callable[[Any, Any], None],
    ):
        self.pool, self.index, self.chunks = pool, index, range(chunks)
        self.states, self.gradient, self.pass_on, self.close = hidden_states, gradient, pass_on, close

    def submit(self) -> None:
        """Queue the first task, and each further one as soon as what it needs is there."""
        self.pool.submit(RouteTokensAgain(self.index, self.states), self._routed)

    def _routed(self, routed: Any, _: Any) -> None:
        self._routing = self.pool.put(routed)
        forward = (ForwardExpertsAgain(self.index, chunk, self._routing) for chunk in self.chunks)
        submit_all(self.pool, forward, self._forwarded)

    def _forwarded(self, chunks: list[Any]) -> None:
        outputs, self._seen = self.pool.put([given for given, _ in chunks]), [seen for _, seen in chunks]
        task = GradientAtExperts(self.index, self.states, self.gradient, self._routing, outputs)
        self.pool.submit(task, self._reached_experts)

    def _reached_experts(self, gradients: Any, totals: Any, seen: Any) -> None:
        self._seen.append(seen)
        self._totals, at_experts, so_far = map(self.pool.put, (totals, gradients, self._seen))
        backward = (BackwardExperts(self.index, chunk, self._routing, at_experts, so_far) for chunk in self.chunks)
        submit_all(self.pool, backward, self._passed_experts)

    def _passed_experts(self, chunks: list[Any]) -> None:
        self._profiles = [profile for _, profile in chunks]
        of_experts = self.pool.put([gradients for gradients, _ in chunks])
        task = BackwardJoined(self.index, self.states, self.gradient, self._routing, self._totals, of_experts)
        self.pool.submit(task, self._joined)

    def _joined(self, gradient: HostTensor, seen: Any) -> None:
        self.pass_on(gradient)
        task = ProfileMixtureAgain(self.index, self.pool.put([*self._seen, seen]))
        self.pool.submit(task, lambda of_layer: self.close(joined_profile(of_layer, self._profiles), {}))


def joined_profile(of_layer: Any, of_chunks: list[Any]) -> Any:
    """A mixture's profile, of what is made of all and of the parts that are made of single chunks."""
    return {**of_layer, **{name: joined([part[name] for part in of_chunks]) for name in of_chunks[0]}}
