"""Which results are good enough to ship: bounds on numbers, and which of them a number breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf, isfinite

from distprune.errors import InputError
from distprune.pipeline.measuring import Measured
from distprune.pipeline.settings import Bound, GateConfig

PERPLEXITY, FINITE = "perplexity", "finite"


@dataclass(frozen=True)
class Miss:
    """A number that a bound does not let through. ``limit`` is the bound in the number's own units.

    The bound "finite" is every number's, whether it is given or not.
    """

    metric: str
    value: float
    bound: str
    limit: float

    def __str__(self) -> str:
        if not isfinite(self.value):
            return f"{self.metric} is {self.value}, which is no number to ship"
        side = "below" if "least" in self.bound else "above"
        return f"{self.metric} {self.value:.4g} is {side} {self.limit:.4g} ({self.bound})"


def judge(gate: GateConfig, dense: Measured, pruned: Measured) -> list[Miss]:
    """What keeps a pruned model from shipping; nothing where it passes.

    Raises:
        InputError: a bound is on a metric that its task does not give.
    """
    return [miss for bound, metric, *values in bounded(gate, dense, pruned) for miss in misses(bound, metric, *values)]


def check_metrics(gate: GateConfig, measured: Measured) -> None:
    """See that every bound is on a number that there is, as soon as one model was measured.

    Raises:
        InputError: one is not; names those that are.
    """
    list(bounded(gate, measured, measured))


def bounded(gate: GateConfig, dense: Measured, pruned: Measured) -> Iterator[tuple[Bound | None, str, float, float]]:
    """Every number to judge: its bound, its name, and the dense and the pruned model's value.

    Perplexity, where it was measured, is always one of them: it has to be finite at least.
    """
    if pruned.perplexity is not None:
        yield gate.perplexity, PERPLEXITY, dense.perplexity, pruned.perplexity
    for task, bounds in gate.tasks.items():
        for metric, bound in bounds.items():
            yield bound, f"{task} {metric}", score(dense, task, metric), score(pruned, task, metric)


def score(measured: Measured, task: str, metric: str) -> float:
    found = measured.tasks.get(task, {})
    if metric not in found:
        given = (
            f"'{metric}', but {', '.join(sorted(found))}" if found else f"scores, but {', '.join(measured.tasks)} do"
        )
        raise InputError(f"gate.tasks.{task}.{metric}: {task} gives no {given}.")
    return found[metric]


def misses(bound: Bound | None, metric: str, dense: float, pruned: float) -> Iterator[Miss]:
    """The parts of a bound that a number breaks."""
    if not isfinite(pruned):
        yield Miss(metric, pruned, FINITE, inf)
        return
    for name, factor in (bound.model_dump(exclude_none=True) if bound else {}).items():
        limit = factor * dense if name.endswith("times_dense") else factor
        if not (pruned >= limit if name.startswith("at_least") else pruned <= limit):
            yield Miss(metric, pruned, name, limit)
