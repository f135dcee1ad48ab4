"""The first stages: see that every weight is sound, and let the model write its calibration set if it has none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distprune.calibration import CalibrationMetadata, write_calibration
from distprune.engine.stages.context import FirstStages
from distprune.engine.worker.check_tasks import CheckLayer, CheckOuter, ProveLayer
from distprune.engine.worker.pass_tasks import WriteOwnSamples


@dataclass(frozen=True)
class Check:
    """Every weight is read once, all workers at once, and one layer of every kind is proved to be understood.

    Attributes:
        proved: a layer of every kind.
    """

    context: FirstStages
    proved: Sequence[int] = ()

    def run(self) -> None:
        """
        Raises:
            InputError: names the first bad tensor found and its file, or a family that is not understood.
        """
        pool, progress, layers = self.context.pool, self.context.progress, self.context.layers

        def receive(_: None) -> None:
            progress.advance()

        progress.stage("Checking weights", len(self.proved) + layers + 1)
        for index in self.proved:
            pool.submit(ProveLayer(index), receive)
        pool.submit(CheckOuter(), receive)
        for index in range(layers):
            pool.submit(CheckLayer(index), receive)
        pool.run()


@dataclass(frozen=True)
class OwnSamples:
    """The model writes its own calibration set: the one step that needs it whole, on one worker."""

    context: FirstStages

    def run(self, output: Path) -> None:
        """Write the set to ``output``."""
        progress = self.context.progress
        progress.stage("Own samples", 1)

        def receive(tokens: np.ndarray, metadata: CalibrationMetadata) -> None:
            write_calibration(output, tokens, metadata)
            progress.advance()

        self.context.pool.submit(WriteOwnSamples(), receive)
        self.context.pool.run()
