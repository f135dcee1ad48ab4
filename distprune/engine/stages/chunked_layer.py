"""A layer of the pruning pass whose experts come a chunk at a time: each chunk is a task, for any idle worker."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from distprune.engine.scheduler.pool import WorkerPool
from distprune.engine.stages.chunked_passes import submit_all
from distprune.engine.worker.expert_tasks import JoinExperts, PruneAround, PruneExperts
from distprune.engine.worker.host_tensor import HostTensor
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.report import Report


class ChunkedLayer:
    """The tasks that take the place of one.

    Args:
        pool: the workers.
        task: what they do together.
        chunks: of experts that the pruned layer has.
        then: gets what the task would give.
    """

    def __init__(self, pool: WorkerPool, task: Prune, chunks: int, then: Callable[..., None]):
        self.pool, self.task, self.chunks, self.then = pool, task, chunks, then

    def submit(self) -> None:
        """Queue the first task, and each further one as soon as what it needs is there."""
        self.pool.submit(PruneAround.of(self.task), self._begin_experts)

    def _begin_experts(self, finished: Finished, state: Any, routed: Any, report: Report) -> None:
        self._around, self._state, self._report = finished, self.pool.put(state), report
        self._routed, task = self.pool.put(routed), self.task
        pruning = [
            PruneExperts(task.index, task.planned, task.profile, task.propagates, chunk, self._routed)
            for chunk in range(self.chunks)
        ]
        submit_all(self.pool, pruning, self._join)
        if not pruning:
            self._join([])

    def _join(self, chunks: list[tuple[Any, Any, Report]]) -> None:
        self._chunks = chunks
        if not self.task.propagates:
            self._end(None)
            return
        task, outputs = self.task, self.pool.put([outputs for _, outputs, _ in chunks])
        pairs = self._around.rotary_pairs
        joining = JoinExperts(task.index, task.hidden_states, task.planned, self._state, pairs, self._routed, outputs)
        self.pool.submit(joining, self._end)

    def _end(self, output: HostTensor | None) -> None:
        written = [self._around.written, *(piece for piece, _, _ in self._chunks)]
        report = together([self._report, *(report for _, _, report in self._chunks)])
        self.then(Finished(written, self._around.rotary_pairs), output, report)


def together(reports: list[Report]) -> Report:
    """One report of several tasks: how long each step took all of them, and all warnings."""
    seconds: Counter[str] = Counter()
    for report in reports:
        seconds.update(report.seconds)
    return Report(dict(seconds), [warning for report in reports for warning in report.warnings])
