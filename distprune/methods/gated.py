"""Methods whose gates are learnt end to end, between the dense pass and the plan.

A gate stands on a diagonal between two matrices: closed, it takes a column of one and a row of the other with it. The
weights stay as they are. In each step the engine runs the layers with their gates' values, compares the model's
predictions with the dense model's, and passes the gradient back; :mod:`distprune.gates` says what is learnt from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count, islice

import torch
from pydantic import Field
from torch import Tensor

from distprune.budgets import Target
from distprune.config import part_of_step
from distprune.gates import GateLearner, Gates, GateSchedule, generator_of
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods.base import Method, Profile
from distprune.statistics import LayerStatistics, Moment


class GatedMethod(Method):
    """A method with gates in every layer.

    A profile has log α of the layer's gates, as they begin, under their names; when they have learnt, what they have
    come to stands there.
    """

    steps: int = Field(200, ge=1, description="steps that the gates learn for")
    batch: int = Field(4, ge=1, description="samples a step")
    rate: float = Field(0.1, gt=0, description="learning rate of the gates (Adam)")
    multiplier_rate: float = Field(0.5, gt=0, description="learning rate of the Lagrangian's multipliers (Adam)")
    ramp: float = Field(0.8, ge=0, le=1, description="share of the steps in which the target falls to its final value")
    seed: int = Field(0, ge=0, description="seed of the gates that are drawn and of the samples' order")

    @property
    def schedule(self) -> GateSchedule:
        """How the gates learn."""
        ramp = round(self.ramp * self.steps)
        return GateSchedule(self.steps, self.rate, self.multiplier_rate, ramp, self.seed)

    def learner(self, target: Target, profiles: Sequence[Profile]) -> GateLearner:
        """The gates of all layers, as they begin."""
        start, shares = [], []
        for index, profile in enumerate(profiles):
            amounts = self.gate_amounts(target, index)
            start.append({name: profile[name] for name in amounts})
            each = {name: amount / (target.dense * profile[name].numel()) for name, amount in amounts.items()}
            shares.append({name: torch.tensor(share) for name, share in each.items()})
        return GateLearner(start, shares, target.remaining / target.dense, self.schedule)

    def batches(self, samples: int) -> Iterator[Tensor]:
        """The numbers of every step's samples: again and again all of them, in an order drawn anew each time."""
        batches = (
            batch
            for epoch in count()
            for batch in torch.randperm(samples, generator=generator_of(self.seed, epoch)).split(self.batch)
        )
        return islice(batches, self.steps)

    def micro_batch(self, most: int) -> int:
        """Samples in one forward pass of a step."""
        return part_of_step(self.batch, most)

    def gate_amounts(self, target: Target, index: int) -> Mapping[str, float]:
        """The names of the gates that dense layer ``index`` has, and what of the target's resource goes when all of
        that name are closed."""
        raise NotImplementedError

    def with_diagonals(self, layer: DecoderLayer, profile: Profile, names: Collection[str]) -> DecoderLayer:
        """The dense layer, written such that the gates of these names have their diagonals between two matrices."""
        raise NotImplementedError

    def gated(self, layer: DecoderLayer, gates: Gates) -> DecoderLayer:
        """What :meth:`with_diagonals` gave, with these values of the gates in it."""
        raise NotImplementedError

    def gate_moments(self, shape: LayerShape, names: Collection[str]) -> Sequence[Moment]:
        """Moments of the gated layer and its gradients that :meth:`gate_gradients` needs, given the dense shape."""
        raise NotImplementedError

    def gate_gradients(self, layer: DecoderLayer, statistics: LayerStatistics, names: Collection[str]) -> Gates:
        """The gradient in every gate of these names of the loss, summed over the tokens that were seen.

        Args:
            layer: what :meth:`with_diagonals` gave.
            statistics: of the gated layer.
            names: of its gates.
        """
        raise NotImplementedError
