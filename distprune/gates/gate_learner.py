"""What all gates of a model learn, step by step, from the gradients that a loss has in them.

The gates are few beside the weights, one a neuron at most, so one process holds them all. Whoever runs the model needs
to know the gates' values alone, and gives the loss's gradient in these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distprune.gates.hard_concrete import open_probability, sample
from distprune.gates.lagrangian import penalty, ramped
from distprune.layers.determinism import threads

#: Gates of one layer, or something about each of them, by name.
Gates = Mapping[str, Tensor]
#: Uniform numbers stay so far from 0 and 1.
MARGIN = 1e-6
#: Between the generators of two seeds. torch's on the CPU knows the lower 32 bits of what it is given alone.
SEEDS_APART = 1_000_003
#: How much faster the multiplier of what is squared ascends: the square of an excess is little.
OF_SQUARE = 10
#: What Adam knows of a parameter.
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class GateSchedule:
    """How gates learn.

    Attributes:
        steps: of the optimizer.
        rate: Adam's learning rate of log α.
        multiplier_rate: Adam's of the ascent on the Lagrangian's first multiplier.
        ramp: steps until the target is the final one.
        seed: of what is drawn.
    """

    steps: int
    rate: float
    multiplier_rate: float
    ramp: int
    seed: int


class GateLearner:
    """The gates of all layers, and their constraint.

    Args:
        start: log α of every layer's gates.
        shares: of each gate, the share of the whole model's size that goes when it is closed.
        target: the share of the size that is to stay.
        schedule: how they learn.
    """

    def __init__(self, start: Sequence[Gates], shares: Sequence[Gates], target: float, schedule: GateSchedule):
        self._like = [{name: gate.shape for name, gate in layer.items()} for layer in start]
        self._log_alpha = joined(start).requires_grad_()
        self._shares = joined(
            [{name: layer[name].expand(of[name]) for name in of} for layer, of in zip(shares, self._like, strict=True)]
        )
        self._target, self._schedule = target, schedule
        self._multipliers = [torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2)]
        rates = schedule.multiplier_rate, OF_SQUARE * schedule.multiplier_rate
        ascending: list[dict[str, Any]] = [
            {"params": [multiplier], "lr": rate, "maximize": True}
            for multiplier, rate in zip(self._multipliers, rates, strict=True)
        ]
        self._optimizer = torch.optim.Adam([{"params": [self._log_alpha]}, *ascending], schedule.rate)
        self.steps = 0  # that were taken

    # ---------------------------------------------------------------- a step

    def gates(self) -> list[Gates]:
        """The gates' values that the coming step draws, in every layer; the same when asked again."""
        with torch.no_grad(), threads(1):
            return self._parted(self._drawn().float())

    def learn(self, gradients: Sequence[Gates], tokens: int) -> None:
        """Take a step, given the loss's gradient in each of :meth:`gates`, summed over so many tokens."""
        with torch.enable_grad(), threads(1):
            own = [{name: layer[name] for name in like} for layer, like in zip(gradients, self._like, strict=True)]
            target = ramped(self._target, self.steps, self._schedule.ramp)
            loss = (joined(own) * self._drawn()).sum() / tokens
            loss = loss + penalty(self._size(), target, torch.cat(self._multipliers))
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
        self.steps += 1

    def _drawn(self) -> Tensor:
        generator = generator_of(self._schedule.seed, self.steps)
        uniform = torch.rand(len(self._log_alpha), generator=generator, dtype=torch.float64)
        return sample(self._log_alpha, uniform.clamp(MARGIN, 1 - MARGIN))

    def _size(self) -> Tensor:
        return 1 - (self._shares * (1 - open_probability(self._log_alpha))).sum()

    # ---------------------------------------------------------------- what has come of it

    @property
    def log_alpha(self) -> list[Gates]:
        """What every layer's gates are drawn by, in float32."""
        return self._parted(self._log_alpha.detach().float())

    @property
    def size(self) -> float:
        """The share of the model's size that is expected to stay."""
        with torch.no_grad(), threads(1):
            return float(self._size())

    def state(self) -> dict[str, Tensor]:
        """All that :meth:`take_up` needs to go on from here."""
        state = {"steps": torch.tensor(self.steps)}
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            state |= {name: parameter.detach()} | {f"{name}.{key}": value for key, value in moments.items()}
        return state

    def take_up(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""
        self.steps = int(state["steps"])
        for name, parameter in self._parameters.items():
            with torch.no_grad():
                parameter.copy_(state[name])
            if self.steps:
                self._optimizer.state[parameter] = {key: state[f"{name}.{key}"].clone() for key in MOMENTS}

    @property
    def _parameters(self) -> dict[str, Tensor]:
        first, second = self._multipliers
        return {"log_alpha": self._log_alpha, "multiplier": first, "multiplier_of_square": second}

    def _parted(self, flat: Tensor) -> list[Gates]:
        sizes = [shape.numel() for layer in self._like for shape in layer.values()]
        parts = iter(flat.split(sizes))
        return [{name: next(parts).view(shape) for name, shape in layer.items()} for layer in self._like]


def generator_of(seed: int, number: int) -> torch.Generator:
    """What draws for a step, or an epoch, of that number."""
    return torch.Generator().manual_seed(SEEDS_APART * seed + number)


def joined(layers: Sequence[Gates]) -> Tensor:
    """All numbers of all layers, one after the other, in float64."""
    flat = [tensor.double().flatten() for layer in layers for tensor in layer.values()]
    return torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64)
