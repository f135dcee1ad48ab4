"""Layer-wise distillation: every pruned layer learns from the dense model's hidden states, all at once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import numpy as np
import torch

from distprune.config import DistillConfig
from distprune.distillation.layerwise import DistillationReport
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.distill_task import Distill
from distprune.engine.worker.host_tensor import HostTensor, pack_all
from distprune.engine.worker.layer_worker import Finished
from distprune.engine.worker.pass_tasks import Advance, Embed
from distprune.layers.parts import DecoderLayer

#: Gives a pruned layer back.
LayerSource = Callable[[int], DecoderLayer]
#: Called with each distilled layer as soon as it is there: index, tensors or file, and how its distillation went.
DistilledSink = Callable[[int, Finished, DistillationReport], None]


class LayerwiseDistillation:
    """The whole stage.

    The dense model runs over the distillation's calibration set as far as is needed for some layers to learn at a
    time, so that the hidden states of few layers exist at once.

    Args:
        tokens: of the calibration set that is learnt from, (samples, length).
        options: epochs, learning rate and the like.
        source: gives a pruned layer.
        sink: gets each layer when it has learnt.
    """

    def __init__(
        self, context: RunContext, tokens: np.ndarray, options: DistillConfig, source: LayerSource, sink: DistilledSink
    ):
        self.context, self.pool, self.tokens, self.options = context, context.pool, tokens, options
        self.source, self.sink = source, sink
        self._most = 2 * len(context.pool.workers)
        self._states: dict[int, Any] = {}  # the dense hidden states at the input of layers
        self._advancing: set[int] = set()
        self._learning: set[int] = set()
        self._waiting: list[int] = []

    def run(self, done: Collection[int]) -> None:
        """Let all layers learn but those that are ``done``."""
        layers = self.context.layers
        self.context.progress.stage("Distilling", layers, len(done))
        self._waiting = sorted(set(range(layers)) - set(done))
        if self._waiting:
            tokens = self.pool.put(HostTensor(self.tokens, torch.int32))
            self.pool.submit(Embed(tokens), partial(self._arrive, 0))
        self.pool.run()

    def _arrive(self, index: int, hidden_states: HostTensor) -> None:
        """The dense hidden states at the input of layer ``index``, or at the model's end, are there."""
        self._states[index] = self.pool.put(hidden_states)
        self._go_on()

    def _go_on(self) -> None:
        """Let the next layers learn, or the dense model advance until they can."""
        while self._waiting and len(self._learning) < self._most:
            index, newest = self._waiting[0], max(self._states)
            for passed in [number for number in self._states if number < min(index, newest)]:
                del self._states[passed]
            needed = index, index + 1, self.options.end_of_look_ahead(index, self.context.layers)
            if newest < needed[-1]:
                self._advance(newest)
                return
            self._start(index, [self._states[number] for number in needed])

    def _advance(self, index: int) -> None:
        if index not in self._advancing:
            self._advancing.add(index)
            self.pool.submit(Advance(index, self._states[index]), partial(self._arrive, index + 1))

    def _start(self, index: int, states: list[Any]) -> None:
        self._waiting.remove(index)
        self._learning.add(index)
        self.pool.submit(Distill(index, pack_all(self.source(index)), *states), partial(self._receive, index))

    def _receive(self, index: int, finished: Finished, report: DistillationReport) -> None:
        self.sink(index, finished, report)
        self._learning.remove(index)
        self.context.progress.advance()
        self._go_on()
