"""The pass that fills a library: every part of every layer in all its sizes, on the dense model's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from distprune.engine.run.library import PartFiles
from distprune.engine.run.states import DENSE, load_states
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.host_tensor import pack_all, unpack_all
from distprune.engine.worker.library_tasks import SolvePart
from distprune.engine.worker.task import Later
from distprune.methods import Profile


@dataclass(frozen=True)
class LibraryPass:
    """The parts of all layers, a task each: no part needs another.

    Attributes:
        profiles: what the passes through the dense model have left of every layer.
        files: where the parts go; those that are there are not solved again.
    """

    context: RunContext
    profiles: Sequence[Profile]
    files: PartFiles

    def run(self) -> None:
        """Fill the library."""
        missing = [number for number in range(len(self.files.parts)) if not self.files.has(number)]
        total = len(self.files.parts)
        self.context.progress.stage("Solving parts in all sizes", total, total - len(missing))
        with self.context.pool.write_behind() as write:
            for number in missing:
                part = self.files.parts[number]
                states, profile = (Later(partial(given, part.layer)) for given in (self._dense_states, self._profile))
                task = SolvePart(part.layer, part.part, part.shapes[1:], states, profile)
                self.context.pool.submit(task, lambda sizes, number=number: write(partial(self._keep, number, sizes)))
            self.context.pool.run()

    def _dense_states(self, index: int) -> Any:
        return self.context.pool.put(load_states(self.context.journal, DENSE, index))

    def _profile(self, index: int) -> Any:
        return pack_all(self.profiles[index])

    def _keep(self, number: int, sizes: Sequence[Any]) -> None:
        self.files.write(number, unpack_all(sizes))
        self.context.progress.advance()
