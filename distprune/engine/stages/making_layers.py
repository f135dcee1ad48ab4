"""From the calibration set, or from a library, to the pruned layers: passes, plan, search, pruning, round by round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from distprune.engine.run.calibration_size import too_few_tokens
from distprune.engine.run.expert_tokens import seldom_used, tokens_by_layer
from distprune.engine.run.journal import fingerprint
from distprune.engine.run.layer_files import PRUNED, LayerFiles
from distprune.engine.run.library import Library, PartFiles
from distprune.engine.run.preflight import Job
from distprune.engine.run.record import CalibrationRecord, forecast
from distprune.engine.run.work_folder import WorkFolder
from distprune.engine.stages.context import RunContext
from distprune.engine.stages.dense_pass import DensePass
from distprune.engine.stages.gate_learning import GateLearning
from distprune.engine.stages.gradient_pass import GradientPass
from distprune.engine.stages.library_pass import LibraryPass
from distprune.engine.stages.pruned_passes import is_measured, kind_of_round, measure_again
from distprune.engine.stages.pruning_pass import PruningPass
from distprune.engine.stages.searching import Search
from distprune.engine.worker.host_tensor import pack_all
from distprune.engine.worker.library_tasks import TakeFromLibrary
from distprune.engine.worker.task import Later
from distprune.methods import CostCurve, Plan, Profile
from distprune.search import PartOptions, library_options, plan_of_parts, searched_plan

#: Journal entry of what a search has ended with.
FOUND = "search"
#: What a run's identity says of the size that is asked for and of what comes after it, and not of how parts are solved.
OF_THE_SIZE = (
    *("sparsity", "target", "count_embeddings", "latencies", "search", "propagation"),
    *("distill", "distillation text", "max_shard_size"),
)


@dataclass(frozen=True)
class Made:
    """The pruned layers, and what is known of how they came about.

    Attributes:
        plan: their shapes.
        files: the layers.
        expert_tokens: of each layer with a mixture, how many tokens each expert has seen.
        cost_curves: what the plan was made from, layer by layer.
        notes: what is to be said of it.
    """

    plan: Plan
    files: LayerFiles
    expert_tokens: list[list[int] | None]
    cost_curves: list[Mapping[str, CostCurve]]
    notes: list[str]


@dataclass(frozen=True)
class MakingLayers:
    """The stages of one run that make its layers.

    Attributes:
        context: the run.
        job: what it is to make.
        work: the folder that it works in.
        device: the kind of the workers' device.
    """

    context: RunContext
    job: Job
    work: WorkFolder
    device: str

    # ---------------------------------------------------------------- by pruning

    def by_pruning(self, tokens: np.ndarray, held_out: np.ndarray | None, calibration: CalibrationRecord) -> Made:
        """Prune the model.

        Args:
            tokens: of the calibration set, (samples, length).
            held_out: what a search measures on, (samples, length).
            calibration: what both are of.
        """
        context, job, work = self.context, self.job, self.work
        with work.timed("dense pass"):
            profiles = DensePass(context, tokens, job.needs_gradients, job.learns_gates).run()
        if job.needs_gradients:
            with work.timed("gradient pass"):
                profiles = GradientPass(context, tokens).run()
        if job.learns_gates:
            with work.timed("gates"):
                profiles = GateLearning(context, job.method, job.target, tokens, profiles).run()
        expert_tokens = tokens_by_layer(profiles)
        notes = [*seldom_used(expert_tokens)]
        planned = partial(self._plan, held_out=held_out, calibration=calibration)
        plan = planned(profiles, 1)
        notes += too_few_tokens(plan, tokens.size, job.architecture.hidden_size)
        for note in notes:
            context.progress.note(note)
        files = self._pruned(plan, profiles, 1)
        for number in range(2, 1 + job.config.rounds):
            with work.timed("measure again"):
                profiles = measure_again(context, tokens, files.read, number)
            files.drop_pruned()
            plan = planned(profiles, number)
            files = self._pruned(plan, profiles, number)
        return Made(plan, files, expert_tokens, self._cost_curves(profiles), [*notes, *self._found["notes"]])

    def _plan(
        self, profiles: Sequence[Profile], number: int, held_out: np.ndarray | None, calibration: CalibrationRecord
    ) -> Plan:
        """The plan of a round, that of the last refined by a search if there is one."""
        config = self.job.config
        if held_out is None or number < config.rounds:
            return self.job.method.plan(self.job.target, profiles, config.align)
        return self._searched(profiles, held_out, calibration)

    def _pruned(self, plan: Plan, profiles: Sequence[Profile], number: int) -> LayerFiles:
        """The layers of a round, which are pruned unless the next one has measured what it needs to know of them."""
        context, job, work = self.context, self.job, self.work
        if plan.predicted_loss is not None:
            context.progress.note(forecast(plan.predicted_loss, plan.gap))
        is_last = number == job.config.rounds
        files = self._files(plan, PRUNED if is_last else kind_of_round("layer", number))
        if not is_measured(context, number + 1):
            with work.timed("prune" if number == 1 else "prune again"):
                PruningPass(context, plan, profiles, files.keep_pruned, is_last).run(files.pruned())
        return files

    def _files(self, plan: Plan, kind: str = PRUNED) -> LayerFiles:
        return LayerFiles(self.job, plan, self.work.writer, self.work.journal, self.context.progress, kind)

    def _cost_curves(self, profiles: Sequence[Profile]) -> list[Mapping[str, CostCurve]]:
        """What the method's plan was made from, layer by layer."""
        shapes = self.job.architecture.dense_shapes
        return [self.job.method.cost_curves(shape, profile) for shape, profile in zip(shapes, profiles, strict=True)]

    # ---------------------------------------------------------------- with a search

    def _searched(self, profiles: Sequence[Profile], held_out: np.ndarray, calibration: CalibrationRecord) -> Plan:
        """The plan that a search ends with, and the library that it finds it with."""
        job, journal = self.job, self.work.journal
        menus = job.method.menus(job.target, profiles, job.config.align)
        parts = library_options(job.target, menus)
        folder = job.config.library or self.work.folder / "library"
        if not journal.has(FOUND):
            files = PartFiles(folder, parts)
            files.begin(self._identity_of(parts))
            with self.work.timed("library"):
                LibraryPass(self.context, profiles, files).run()
            with self.work.timed("search"):
                found = Search(self.context, job.target, files, held_out, job.config.search).run()
            if job.config.library:
                settings = job.config.model_dump(mode="json")
                Library(parts, found.prices, job.model_identity, settings, calibration).write(folder)
            journal.write(FOUND, asdict(found))
        return searched_plan(job.target, menus, parts, self._found["prices"], job.config.align)

    def _identity_of(self, parts: Sequence[PartOptions]) -> str:
        """What tells a library from every other: runs that only ask for another size of the model share one."""
        run = {name: value for name, value in self.job.identity(self.device).items() if name not in OF_THE_SIZE}
        return fingerprint({**run, "parts": [part.to_json() for part in parts]})

    @property
    def _found(self) -> dict[str, Any]:
        """What the search has ended with, see :class:`distprune.engine.stages.searching.Found`."""
        journal = self.work.journal
        return journal.report(FOUND) if journal.has(FOUND) else {"notes": []}

    # ---------------------------------------------------------------- from a library

    def from_library(self, library: Library) -> Made:
        """Take all layers from a library: of every part the size with which the whole costs least."""
        job, context = self.job, self.context
        choices, plan = plan_of_parts(job.target, library.parts, library.prices)
        files, parts = self._files(plan), PartFiles(job.config.from_library, library.parts)
        missing = sorted(set(range(context.layers)) - files.pruned())
        context.progress.stage("Taking parts from the library", context.layers, context.layers - len(missing))

        def receive(index: int, *results: Any) -> None:
            files.keep_pruned(index, *results)
            context.progress.advance()

        def chosen(index: int) -> Any:
            return pack_all(parts.chosen(job.target, index, choices))

        with self.work.timed("take"):
            for index in missing:
                context.pool.submit(TakeFromLibrary(index, Later(partial(chosen, index))), partial(receive, index))
            context.pool.run()
        nothing: list[Any] = [None] * context.layers
        return Made(plan, files, nothing, [{} for _ in range(context.layers)], [])
