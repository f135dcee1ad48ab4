"""The pass that measures a plan, and variations of single layers of it, on text that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import fsum
from typing import Any

from distprune.engine.run.states import load_states, save_states
from distprune.engine.scheduler.relay import Relay
from distprune.engine.stages.context import RunContext
from distprune.engine.worker.host_tensor import HostTensor, pack_all, unpack
from distprune.engine.worker.library_tasks import Chosen
from distprune.engine.worker.measuring_tasks import Divergence, OpenPlanned
from distprune.engine.worker.pass_tasks import CloseLayer, CloseLoss, OpenLoss, Sweep
from distprune.engine.worker.task import Later, Task

#: Gives what a layer is in the plan, and what else it is to be measured as.
Variations = Callable[[int], tuple[Chosen, Sequence[Chosen]]]


class MeasuringPass(Relay):
    """One pass from a layer to the model's end.

    Args:
        states: the kind of journal entries that hold the plan's hidden states.
        keeps: whether they are kept at every layer, for passes that begin there.
        variations: of each layer; read when a worker begins with it.
        dense: the kind of entries that hold the dense model's at the model's end; None makes them of this plan's.
    """

    def __init__(
        self, context: RunContext, states: str, variations: Variations, dense: str | None, keeps: bool = False
    ):
        super().__init__(
            context.pool, context.layers + (dense is not None), context.micro_batch, keeps_end=dense is None
        )
        self.context, self.journal, self.layers = context, context.journal, context.layers
        self._states, self._variations, self._dense, self._keeps = states, variations, dense, keeps
        self._found: list[float] = []

    def run(self, first: int, hidden_states: HostTensor) -> list[float]:
        """Measure from a layer on.

        Args:
            hidden_states: at its input, (samples, length, d).

        Returns:
            By how much the plan's predictions, and those of all variations in the order of the layers, diverge from the
            dense model's, in nats a token; nothing where the dense model's are to be made.
        """
        samples, length, _ = hidden_states.array.shape
        self._tokens = samples * length
        self.begin(first, HostTensor(hidden_states.array[:, None], hidden_states.dtype))
        self.carry_through()
        return self._found

    def opening(self, station: int) -> Task:
        if station == self.layers:
            return OpenLoss()
        planned, others = (Later(partial(self._packed, station, place)) for place in range(2))
        return OpenPlanned(station, planned, others)

    def _packed(self, index: int, place: int) -> Any:
        return pack_all(self._variations(index)[place])

    def passing(self, station: int, number: int, samples: slice, piece: Any) -> Task:
        if station < self.layers:
            return Sweep(station, number, piece)
        return Divergence(piece, Later(partial(self._dense_end, samples)))

    def _dense_end(self, samples: slice) -> Any:
        assert self._dense is not None
        return self.pool.put(load_states(self.journal, self._dense, self.layers, samples))

    def closing(self, station: int, pieces: int) -> Task:
        return CloseLoss() if station == self.layers else CloseLayer(station, pieces)

    def reached(self, station: int, pieces: list[HostTensor]) -> None:
        if self._keeps if station < self.layers else self._dense is None:
            own = [HostTensor(piece.array[:, 0], piece.dtype) for piece in pieces]
            save_states(self.journal, self._states, station, own)

    def closed(self, station: int, *results: Any) -> None:
        if station == self.layers:
            [divergences] = results
            self._found = [fsum(of_variant) / self._tokens for of_variant in unpack(divergences).mT.tolist()]
        else:
            self.context.progress.advance()
