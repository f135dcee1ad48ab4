"""Parts become shards: the last stage that takes the workers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from distprune.checkpoint import WrittenFile
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.write_tasks import Merge


@dataclass(frozen=True)
class MergeShards:
    """Workers merge parts into shards; what no worker can merge is built here.

    Attributes:
        most: shards that are made at a time.
        accept: called with each shard and the file that a worker has written for it.
        build: builds a shard here.
    """

    context: RunContext
    most: int
    accept: Callable[[str, WrittenFile], None]
    build: Callable[[str], None]

    def run(self, shards: Mapping[str, Sequence[str]]) -> None:
        """Make the shards, each of which is given with the names of its parts."""
        pool, progress, waiting = self.context.pool, self.context.progress, deque(shards)
        progress.stage("Assembling", len(shards))

        def submit() -> None:
            if waiting:
                shard = waiting.popleft()
                pool.submit(Merge(tuple(shards[shard])), partial(receive, shard))

        def receive(shard: str, written: WrittenFile | None) -> None:
            if written is None:
                self.build(shard)
            else:
                self.accept(shard, written)
            progress.advance()
            submit()

        for _ in range(self.most):
            submit()
        pool.run()
