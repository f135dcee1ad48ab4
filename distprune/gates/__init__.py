"""Gates that learn to close: the hard concrete distribution, and the constraint on how much may stay open."""

from distprune.gates.gate_learner import GateLearner, Gates, GateSchedule, generator_of
from distprune.gates.hard_concrete import open_probability, sample
from distprune.gates.lagrangian import penalty, ramped

__all__ = [
    "GateLearner",
    "GateSchedule",
    "Gates",
    "generator_of",
    "open_probability",
    "penalty",
    "ramped",
    "sample",
]
