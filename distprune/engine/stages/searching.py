"""The search: a plan is made of a library's parts, measured on held-out text, and made anew at measured prices."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from math import inf

import numpy as np
import torch

from distprune.budgets import Target
from distprune.config import SearchConfig
from distprune.engine.run.journal import entry_of
from distprune.engine.run.library import PartFiles
from distprune.engine.run.states import load_states, save_states
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.measuring_pass import MeasuringPass, Variations
from distprune.engine.worker.host_tensor import HostTensor
from distprune.engine.worker.library_tasks import Chosen
from distprune.engine.worker.pass_tasks import Embed
from distprune.search import Change, affordable_choices, changed_choices, corrected_prices, part_of_the_way

#: The kind of entries that hold the dense model's hidden states on held-out text, at its beginning and end; and that
#: of the entries with those of a plan, before every layer.
HELD_OUT, SEARCHED = "held-out", "searched"
#: Journal entries of what was measured, in its order.
MEASURED = "measured"
#: Variations that one pass measures, at most: so many times the hidden states of held-out text are under way.
VARIATIONS = 32
#: How far towards measured prices a plan is tried, until one is better than the last.
SHARES = (1.0, 0.5, 0.25)


@dataclass
class PlanUnderSearch:
    """A plan that is measured.

    Attributes:
        choices: of every part the size that it has.
        states: the kind of journal entries with its hidden states.
        divergence: of its predictions from the dense model's, in nats a token.
    """

    choices: list[int]
    states: str
    divergence: float = inf


@dataclass(frozen=True)
class Found:
    """What a search ends with: the price of every part, and what it has told."""

    prices: list[float]
    notes: list[str]


@dataclass
class Search:
    """One search.

    Attributes:
        target: what the plan must meet.
        files: the library's parts.
        held_out: token ids that nothing was fitted to, (samples, length).
        options: how long it goes on.
    """

    context: RunContext
    target: Target
    files: PartFiles
    held_out: np.ndarray
    options: SearchConfig
    _passes: Iterator[int] = field(default_factory=count)
    _told: list[str] = field(default_factory=list)

    def run(self) -> Found:
        """Resume where the journal ends."""
        began = time.monotonic()
        self._dense_pass()
        prices = [1.0] * len(self.files.parts)
        plan = self._measured(self._choices(prices))
        self._tell_of("the plan as predicted", plan)
        for number in range(1, 1 + self.options.steps):
            if self.options.seconds is not None and time.monotonic() - began > self.options.seconds:
                break
            found = corrected_prices(self.files.parts, plan.choices, prices, self._measured_changes(plan))
            if (better := self._better(plan, prices, found)) is None:
                self._tell(f"Search: step {number} has found no better plan")
                break
            plan, prices = better
            self._tell_of(f"the plan of step {number}", plan)
        self._forget(plan.states)
        return Found(prices, self._told)

    def _tell_of(self, what: str, plan: PlanUnderSearch) -> None:
        apart = f"{plan.divergence:.4g} nats a token"
        self._tell(f"Search: on held-out text, {what} diverges from the dense model by {apart}")

    def _tell(self, what: str) -> None:
        self._told.append(what)
        self.context.progress.note(what)

    def _choices(self, prices: Sequence[float]) -> list[int]:
        return affordable_choices(self.target, self.files.parts, prices)

    def _better(
        self, plan: PlanUnderSearch, before: list[float], after: list[float]
    ) -> tuple[PlanUnderSearch, list[float]] | None:
        """The first plan on the way from prices to others that measures better, and its prices."""
        tried = [plan.choices]
        for share in SHARES:
            prices = part_of_the_way(before, after, share)
            choices = self._choices(prices)
            if choices in tried:
                continue
            tried.append(choices)
            found = self._measured(choices)
            if found.divergence < plan.divergence:
                self._forget(plan.states)
                return found, prices
            self._forget(found.states)
        return None

    # ---------------------------------------------------------------- measuring

    def _measured(self, choices: list[int]) -> PlanUnderSearch:
        """The plan of these choices, measured."""
        number = next(self._passes)
        plan = PlanUnderSearch(choices, entry_of(SEARCHED, number))
        [plan.divergence] = self._once(number, lambda: self._pass_through(plan))
        return plan

    def _measured_changes(self, plan: PlanUnderSearch) -> dict[Change, float]:
        """By how much more each change of the plan diverges."""
        found: dict[Change, float] = {}
        for some in grouped(self._changes_by_layer(plan)):
            own, *others = self._once(next(self._passes), partial(self._pass_with_changes, plan, some))
            changes = [change for of_layer in some.values() for change in of_layer]
            found |= {change: other - own for change, other in zip(changes, others, strict=True)}
        return found

    def _changes_by_layer(self, plan: PlanUnderSearch) -> dict[int, list[Change]]:
        found: dict[int, list[Change]] = {}
        for change in changed_choices(self.files.parts, plan.choices):
            found.setdefault(self.files.parts[change.part].layer, []).append(change)
        return dict(sorted(found.items()))

    def _once(self, number: int, measure: Callable[[], list[float]]) -> list[float]:
        """What a pass gives, unless an earlier run has made it."""
        entry, journal = entry_of(MEASURED, number), self.context.journal
        if not journal.has(entry):
            journal.write(entry, measure())
        found: list[float] = journal.report(entry)
        return found

    # ---------------------------------------------------------------- passes

    def _dense_pass(self) -> None:
        """Leave the dense model's hidden states at its beginning and end, unless they are there."""
        journal, pool, layers = self.context.journal, self.context.pool, self.context.layers
        if journal.has(entry_of(HELD_OUT, layers)):
            return
        tokens = HostTensor(self.held_out, torch.int32)
        pool.submit(Embed(pool.put(tokens)), lambda states: save_states(journal, HELD_OUT, 0, [states]))
        pool.run()
        dense = [0] * len(self.files.parts)
        self._stage("Held-out text", 0)
        measuring = MeasuringPass(self.context, HELD_OUT, self._as_planned(dense), dense=None)
        measuring.run(0, load_states(journal, HELD_OUT, 0))

    def _pass_through(self, plan: PlanUnderSearch) -> list[float]:
        """Measure a plan; its hidden states before every layer are kept."""
        self._stage("Measuring a plan", 0)
        measuring = MeasuringPass(self.context, plan.states, self._as_planned(plan.choices), dense=HELD_OUT, keeps=True)
        return measuring.run(0, load_states(self.context.journal, HELD_OUT, 0))

    def _pass_with_changes(self, plan: PlanUnderSearch, some: Mapping[int, Sequence[Change]]) -> list[float]:
        """Measure a plan with each of some changes, from the first layer that they change."""
        first, journal = min(some), self.context.journal
        if first and not journal.has(entry_of(plan.states, first)):  # an earlier run had not kept them all
            self._pass_through(plan)

        def variations(index: int) -> tuple[Chosen, list[Chosen]]:
            own = self._chosen(index, plan.choices)
            return own, [self._chosen(index, change.of(plan.choices)) for change in some.get(index, ())]

        self._stage("Measuring changes", first)
        measuring = MeasuringPass(self.context, plan.states, variations, dense=HELD_OUT)
        return measuring.run(first, load_states(journal, plan.states if first else HELD_OUT, first))

    def _as_planned(self, choices: Sequence[int]) -> Variations:
        return lambda index: (self._chosen(index, choices), ())

    def _chosen(self, index: int, choices: Sequence[int]) -> Chosen:
        return self.files.chosen(self.target, index, choices)

    def _stage(self, name: str, first: int) -> None:
        self.context.progress.stage(name, self.context.layers - first)

    def _forget(self, states: str) -> None:
        """Remove a plan's hidden states."""
        for index in range(1 + self.context.layers):
            self.context.journal.remove(entry_of(states, index))


def grouped(changes: Mapping[int, Sequence[Change]]) -> Iterator[dict[int, Sequence[Change]]]:
    """Layers' changes in runs of no more than :data:`VARIATIONS`, or of one layer."""
    some: dict[int, Sequence[Change]] = {}
    for index, of_layer in changes.items():
        if some and sum(map(len, some.values())) + len(of_layer) > VARIATIONS:
            yield some
            some = {}
        some[index] = of_layer
    if some:
        yield some
