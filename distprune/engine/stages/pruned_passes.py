"""The passes through a pruned model, by which a further round plans and prunes the dense model anew.

The forward pass gives every layer what its pruned predecessors make of the calibration set. The gradient pass goes back
through the pruned layers, and observes the dense ones in their places: what it would cost to remove something there,
given what is gone elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import fsum
from typing import Any

import numpy as np

from distprune.engine.run.journal import entry_of
from distprune.engine.run.states import DENSE, load_states, save_states
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.dense_pass import DensePass
from distprune.engine.stages.gradient_pass import HEAD, GradientPass
from distprune.engine.worker.host_tensor import HostTensor, pack_all, unpack
from distprune.engine.worker.pass_tasks import Backward, OpenLoss
from distprune.engine.worker.round_tasks import OpenPlaceOfPruned, OpenPruned, SampledGradient
from distprune.engine.worker.task import Later, Task
from distprune.layers.parts import DecoderLayer
from distprune.methods import Profile

#: Gives a layer that an earlier round has pruned.
PrunedLayers = Callable[[int], DecoderLayer]


def kind_of_round(kind: str, number: int) -> str:
    """What a kind of journal entries is called in a round."""
    return f"round-{number}-{kind}"


class PrunedForward(DensePass):
    """The forward pass through what a round has pruned; see :class:`PrunedBackward`."""

    def __init__(self, context: RunContext, tokens: np.ndarray, pruned: PrunedLayers, number: int):
        super().__init__(context, tokens, for_gradients=True)
        self._pruned = pruned
        self._kind, self._states = kind_of_round("passed", number), kind_of_round("states", number)

    def _begin(self) -> None:
        hidden_states = load_states(self.journal, DENSE, 0)
        save_states(self.journal, self._states, 0, [hidden_states])
        self.begin(0, hidden_states)

    def opening(self, station: int) -> Task:
        return OpenPruned(station, later(self._pruned, station))


class PrunedBackward(GradientPass):
    """The gradient pass through what a round has pruned, with the profiles of the next.

    Args:
        tokens: of the calibration set, (samples, length).
        pruned: the layers of the round before.
        number: of this round, from 2.
    """

    def __init__(self, context: RunContext, tokens: np.ndarray, pruned: PrunedLayers, number: int):
        super().__init__(context, tokens)
        self._pruned, self._number = pruned, number
        self._states, self._gradients = kind_of_round("states", number), kind_of_round("gradient", number)
        self._name_entries(kind_of_round("divergence", number), kind_of_round("profile", number))

    def opening(self, station: int) -> Task:
        index = self._layer(station)
        return OpenLoss() if station == HEAD else OpenPlaceOfPruned(index, later(self._pruned, index))

    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        index = self._layer(station)
        hidden_states = Later(partial(self._stored_states, index, samples))
        if station == HEAD:
            return SampledGradient(hidden_states, Later(partial(self._dense_end, samples)), samples.start)
        return Backward(index, number, hidden_states, piece)

    def _dense_end(self, samples: slice) -> Any:
        return self.pool.put(load_states(self.journal, DENSE, self.layers, samples))

    def _keep_loss(self, losses: HostTensor) -> None:
        divergence = fsum(unpack(losses).tolist()) / self.tokens.size
        self.journal.write(self._entries[HEAD], divergence)
        self.progress.note(
            f"After round {self._number - 1} the model's predictions on the calibration set diverge from the dense "
            f"model's by {divergence:.3g} nats a token"
        )

    def _is_kept(self, index: int) -> bool:
        return False


def is_measured(context: RunContext, number: int) -> bool:
    """Whether all profiles that round ``number`` plans by are there."""
    kind = kind_of_round("profile", number)
    return all(context.journal.has(entry_of(kind, index)) for index in range(context.layers))


def later(pruned: PrunedLayers, index: int) -> Later:
    """A pruned layer, which is read when its task starts."""
    return Later(lambda: pack_all(pruned(index)))


def measure_again(context: RunContext, tokens: np.ndarray, pruned: PrunedLayers, number: int) -> list[Profile]:
    """The profiles that round ``number`` plans by, from the layers that the round before has pruned."""
    PrunedForward(context, tokens, pruned, number).run()
    return PrunedBackward(context, tokens, pruned, number).run()
