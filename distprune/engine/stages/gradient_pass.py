"""The gradient pass: the loss's gradient passed from layer to layer, last to first.

The first station is the model's end, where tokens come in and the loss's gradient goes out; then come the layers from
the last to the first. Each takes the hidden states at its input, which the dense pass has left in the journal, makes
its forward pass again and goes back through it. So exact gradients of a model that fits nowhere need the memory of one
layer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import exp, fsum
from typing import Any

import numpy as np
import torch

from distprune.engine.run.journal import entry_of
from distprune.engine.run.states import DENSE, GRADIENT, load_states, save_states
from distprune.engine.scheduler.relay import Relay
from distprune.engine.stages.chunked_passes import ChunkedBackward
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.dense_pass import PROFILE
from distprune.engine.worker.host_tensor import HostTensor, unpack, unpack_all
from distprune.engine.worker.pass_tasks import Backward, CloseLayer, CloseLoss, LossGradient, OpenBackward, OpenLoss
from distprune.engine.worker.task import Later, Task
from distprune.methods import Profile

#: Journal entry of the dense model's mean loss on the calibration set, in nats a token.
LOSS = "loss"
HEAD = 0  # the station at the model's end


class GradientPass(Relay):
    """The gradient pass of one run, whose dense pass has left the hidden states of all layers.

    Args:
        tokens: of the calibration set, (samples, length).
    """

    def __init__(self, context: RunContext, tokens: np.ndarray):
        super().__init__(context.pool, 1 + context.layers, context.micro_batch, in_one_piece=context.in_one_piece)
        self.context, self.tokens, self.layers = context, tokens, context.layers
        self.journal, self.progress = context.journal, context.progress
        self._states, self._gradients = DENSE, GRADIENT
        self._name_entries(LOSS, PROFILE)

    def _name_entries(self, loss: str, profile: str) -> None:
        self._profile = profile
        layers = (self._layer(station) for station in range(1, 1 + self.layers))
        self._entries = [loss, *(entry_of(profile, index) for index in layers)]

    def _layer(self, station: int) -> int:
        """The layer at a station; at the model's end, the one that would come next."""
        return self.layers - station

    def run(self) -> list[Profile]:
        """Resume where the journal ends. Returns the profiles of all layers."""
        done = self.journal.count_first(self._entries)
        self.progress.stage("Gradient pass", self.layers, max(0, done - 1))
        self._cleared = 0
        self._clear()
        if done == 0:
            self.begin(HEAD, HostTensor(self.tokens, torch.int32))
        elif done < self.stations:
            self.begin(done, load_states(self.journal, self._gradients, self._layer(done)))
        self.carry_through()
        return [self.journal.stored_tensors(entry_of(self._profile, index)) for index in range(self.layers)]

    def opening(self, station: int) -> Task:
        return OpenLoss() if station == HEAD else OpenBackward(self._layer(station))

    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        index = self._layer(station)
        hidden_states = Later(partial(self._stored_states, index, samples))
        if station == HEAD:
            return LossGradient(hidden_states, piece)
        return Backward(index, number, hidden_states, piece)

    def is_shared(self, station: int) -> bool:
        return self._layer(station) in self.context.mixtures_in_chunks

    def share(self, station: int, piece: Any, pass_on: Callable[..., None], close: Callable[..., None]) -> None:
        index = self._layer(station)
        states, chunks = self._stored_states(index, slice(None)), self.context.dense_chunks(index)
        ChunkedBackward(self.pool, index, chunks, states, piece, pass_on, close).submit()

    def _stored_states(self, index: int, samples: slice) -> Any:
        return self.pool.put(load_states(self.journal, self._states, index, samples))

    def closing(self, station: int, pieces: int) -> Task:
        return CloseLoss() if station == HEAD else CloseLayer(self._layer(station), pieces)

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        save_states(self.journal, self._gradients, self._layer(station), pieces)

    def closed(self, station: int, *results: Any) -> None:
        if station == HEAD:
            self._keep_loss(*results)
            self._clear()
        else:
            profile, _ = results  # what is carried to pruning comes from the dense pass
            self.journal.write(self._entries[station], tensors=unpack_all(profile))
            self._clear()
            self.progress.advance()

    def _keep_loss(self, losses: HostTensor) -> None:
        samples, length = self.tokens.shape
        loss = fsum(unpack(losses).tolist()) / (samples * (length - 1))
        self.journal.write(self._entries[HEAD], loss)
        self.progress.note(f"The dense model's perplexity on the calibration set is {exp(loss):.4g}")

    def _is_kept(self, index: int) -> bool:
        """Whether the hidden states at a layer's input, or at the model's end, are needed by a later stage."""
        return self.context.keeps_dense(index)

    def _clear(self) -> None:
        """Remove what the stations that are done have taken, unless one before them is not, since it would come again.

        Pruning needs some of the hidden states, such as those at the input of every block.
        """
        while self._cleared < self.stations and self.journal.has(self._entries[self._cleared]):
            index = self._layer(self._cleared)
            self.journal.remove(entry_of(self._gradients, index))
            if not self._is_kept(index):
                self.journal.remove(entry_of(self._states, index))
            self._cleared += 1
