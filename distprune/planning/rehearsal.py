"""The tasks of a run, done on tensors without values: what each takes, for every kind of layer.

A task that runs layers over samples is done with two micro-batches and with three. So what it takes with any number of
them is known, since every further one takes as much as the third.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves

from distprune.config import PruneConfig
from distprune.engine.run.preflight import learns_gates
from distprune.engine.worker.check_tasks import CheckLayer, CheckOuter
from distprune.engine.worker.dense_model import DenseModel
from distprune.engine.worker.distill_task import Distill
from distprune.engine.worker.end_to_end_tasks import (
    CloseEnd,
    Diverge,
    FoldIn,
    Forward,
    Learn,
    OpenDense,
    OpenEnd,
    OpenStudent,
    StepOptimizer,
)
from distprune.engine.worker.expert_pass_tasks import numbers_of_chunks
from distprune.engine.worker.gate_tasks import CloseGated, OpenGated, OpenGatedBackward, gated_method
from distprune.engine.worker.layer_worker import LayerWorker
from distprune.engine.worker.pass_tasks import (
    Advance,
    Backward,
    CloseLayer,
    CloseLoss,
    Embed,
    LossGradient,
    OpenBackward,
    OpenForward,
    OpenLoss,
    Sweep,
)
from distprune.engine.worker.prune_task import Prune
from distprune.engine.worker.round_tasks import OpenPlaceOfPruned, OpenPruned, SampledGradient
from distprune.engine.worker.task import Task
from distprune.layers.loss import TOKENS_AT_ONCE
from distprune.layers.parts import DecoderLayer
from distprune.layers.shapes import LayerShape
from distprune.methods import make_method
from distprune.planning.as_with_values import AsWithValues
from distprune.planning.counting import Counting, Counts
from distprune.planning.imagined_gpu import IMAGINED_GPU
from distprune.planning.rehearsal_in_chunks import (
    Do,
    backward_in_chunks,
    forward_in_chunks,
    prune_in_chunks,
)
from distprune.planning.rough_shapes import rough
from distprune.planning.valueless_checkpoint import ValuelessCheckpoint
from distprune.planning.valueless_parts import ValuelessParts


@dataclass(frozen=True)
class Done:
    """What one task took, and the bytes that it gave."""

    counts: Counts
    given: int


@dataclass(frozen=True)
class Rehearsed:
    """What a task takes with some samples and with more; of one that gets no samples both are the same.

    Attributes:
        less, more: what it took.
        sizes: with how many samples each.
    """

    less: Done
    more: Done
    sizes: tuple[float, float] = (1, 2)

    def on(self, samples: float, figure: Callable[[Done], float]) -> float:
        """A figure of the task with so many samples."""
        first, second = figure(self.less), figure(self.more)
        small, large = self.sizes
        return first + (samples - small) / (large - small) * (second - first)


#: What tasks of a layer take, by their classes.
Takes = Mapping[type[Task], Rehearsed]


@dataclass
class Rehearsal:
    """The tasks of one run, each done when it is first asked for.

    Attributes:
        config: the run, its dtype settled.
        model: of which the checkpoint's headers are known.
        shapes: what the layers are pruned to.
        device: "cuda" or "cpu".
        samples, length: of a micro-batch.
        distillation_length: of what distillation learns from.
        base: the same run in other micro-batches.
    """

    config: PruneConfig
    model: DenseModel
    shapes: list[LayerShape]
    device: str
    samples: int
    length: int
    distillation_length: int | None = None
    base: Rehearsal | None = None
    _taken: dict[Hashable, Takes] = field(default_factory=dict)
    _middle: dict[tuple[str, int], tuple[Hashable, int]] = field(default_factory=dict)
    #: Inside, tensors that are made have no values.
    _values: FakeTensorMode = field(default_factory=lambda: FakeTensorMode(allow_non_fake_inputs=True))

    # ---------------------------------------------------------------- what is asked

    def with_batch(self, samples: int) -> Rehearsal:
        """The same run in other micro-batches. What is solved in the passes does not depend on them."""
        config = self.config.model_copy(update={"micro_batch": samples})
        return replace(self, config=config, samples=samples, base=self, _taken={})

    def layer(self, index: int) -> Takes:
        """What checking, the passes and pruning take of a layer."""
        forward, _ = self._forward(index)
        backward, _ = self._backward(index)
        return {CheckLayer: self._check(index)} | forward | backward | self._prune(index)

    def learning(self, index: int) -> Takes:
        """What distillation takes of a layer; nothing where there is none."""
        if self.config.distill is None:
            return {}
        key, index = self._like("learning", index, self.kind, self.rough_shape)
        return self._once(key, lambda: self._learning(index))

    def further_round(self, index: int) -> Mapping[type[Task], Takes]:
        """What the passes through a pruned layer take that a further round goes by, by what each of them begins with;
        nothing where there is one round."""
        if self.config.rounds == 1:
            return {}
        key, index = self._like("further round", index, self.kind, self.rough_shape)
        return self._once(key, lambda: self._further_round(index))

    def gate_learning(self, index: int) -> Mapping[type[Task], Takes]:
        """What both ways through a layer take in which gates learn, by what each of them begins with; nothing where
        none do."""
        if not self._learns_gates:
            return {}
        key, index = self._like("gates", index, self.kind, self.carries)
        return self._once(key, lambda: self._gate_learning(index))

    def ends(self) -> Takes:
        """What comes before the first layer and after the last."""
        return self._once("ends", self._ends)

    def group(self, index: int) -> Hashable:
        """Equal for layers of which one stands for the others."""
        return self.kind(index), self.carries(index), self.rough_shape(index)

    # ---------------------------------------------------------------- layers that stand for others

    def kind(self, index: int) -> Hashable:
        """Equal for layers that are alike in the dense model."""
        return self.model.architecture.kind(index)

    def carries(self, index: int) -> bool:
        """Whether moments are carried from a layer's dense pass to its pruning."""
        return index % self._block_length == 0 and self._carries

    def rough_shape(self, index: int) -> Hashable:
        """Equal for layers of which pruning leaves about as much."""
        return self._rough_shapes[index]

    @cached_property
    def _rough_shapes(self) -> list[Hashable]:
        return [
            rough(shape, dense) for shape, dense in zip(self.shapes, self.model.architecture.dense_shapes, strict=True)
        ]

    def _like(self, what: str, index: int, *alike: Callable[[int], Hashable]) -> tuple[Hashable, int]:
        """A key of all layers that are alike, and the layer in their middle, which stands for them."""
        if (what, index) not in self._middle:
            key = tuple(of(index) for of in alike)
            like = [other for other in range(len(self.shapes)) if tuple(of(other) for of in alike) == key]
            self._middle |= {(what, other): ((what, key), like[len(like) // 2]) for other in like}
        return self._middle[what, index]

    def _once(self, key: Hashable, rehearse: Callable[[], Any]) -> Any:
        if key not in self._taken:
            with self._values, AsWithValues():
                self._taken[key] = rehearse()
        return self._taken[key]

    # ---------------------------------------------------------------- a worker

    @cached_property
    def worker(self) -> LayerWorker:
        """Does the tasks. What it makes once and keeps, masks and positions, is not counted."""
        device = torch.device("cpu") if self.device == "cpu" else IMAGINED_GPU
        model = replace(self.model, checkpoint=ValuelessCheckpoint(self.model.checkpoint))
        worker = LayerWorker(self.config.model_copy(update={"device": self.device}), model, device, ValuelessParts())
        for runner in (worker.runner, *([worker.gate_runner] if self._learns_gates else [])):
            runner.shell.fill(worker._small_tensors)
            for dtype in {runner.dtype, runner.gradient_dtype}:
                runner.shell.calls(min(runner.micro_batch, self.samples), self.length, dtype)
        return worker

    @cached_property
    def _learns_gates(self) -> bool:
        return learns_gates(make_method(self.config.method, self.config.options), self.config)

    @property
    def _sizes(self) -> tuple[int, int]:
        """The samples of two micro-batches and of three: while a second one runs, something of the first lives on."""
        return 2 * self.samples, 3 * self.samples

    @property
    def _block_length(self) -> int:
        return self.config.block_length(len(self.shapes))

    @cached_property
    def _carries(self) -> bool:
        method = make_method(self.config.method, self.config.options)
        return any(method.carried_moments(shape) for shape in self.model.architecture.dense_shapes)

    @contextmanager
    def _counting(self) -> Iterator[Callable[[Task], tuple[Done, Any]]]:
        """Yields what does a task, and tells what it took and what it gave."""
        worker, counting = self.worker, Counting()
        worker.model.checkpoint.counting = counting

        def do(task: Task) -> tuple[Done, Any]:
            with counting:
                results = task.run(worker)
                size = sum(leaf.nbytes for leaf in tree_leaves(values_of(results)) if isinstance(leaf, Tensor))
            return Done(counting.take(), size), results

        yield do
        worker.close()
        worker.model.checkpoint.counting = None

    def states(self, batches: int, dtype: torch.dtype | None = None) -> Tensor:
        """Hidden states of so many micro-batches."""
        hidden_size = self.model.architecture.hidden_size
        return torch.empty(batches * self.samples, self.length, hidden_size, dtype=dtype or self.worker.runner.dtype)

    # ---------------------------------------------------------------- rehearsals

    def _check(self, index: int) -> Rehearsed:
        def check(index: int) -> Rehearsed:
            with self._counting() as do:
                return same(do(CheckLayer(index))[0])

        key, index = self._like("check", index, self.kind)
        return self._once(key, lambda: check(index))

    def _forward(self, index: int) -> tuple[Takes, Any]:
        """What a layer's dense pass takes, and what its end gives: the profile, and what is carried to pruning."""

        def forward(index: int) -> tuple[Takes, Any]:
            advancing = {Advance: self._twice(lambda batches: Advance(index, self.states(batches)))}
            if self.worker.chunks(index) is not None:
                taken, given = self._passed_in_chunks(
                    index, lambda states, do: forward_in_chunks(self.worker, index, states, do)
                )
                return taken | advancing, given
            closed = self.base and self.base._forward(index)
            taken, given = self._passed(OpenForward(index), lambda n, b: Sweep(index, n, self.states(b)), closed)
            if self.worker.has_gradient_pass:
                taken = {CloseAfterForward if kind is CloseLayer else kind: takes for kind, takes in taken.items()}
            return taken | advancing, given

        key, index = self._like("forward", index, self.kind, self.carries)
        return self._once(key, lambda: forward(index))

    def _backward(self, index: int) -> tuple[Takes, Any]:
        """The same of its gradient pass, where there is one."""
        gradient = self.worker.runner.gradient_dtype

        def backward(index: int) -> tuple[Takes, Any]:
            if not self.worker.has_gradient_pass:
                return {}, self._forward(index)[1]
            if self.worker.chunks(index) is not None:
                return self._passed_in_chunks(
                    index, lambda states, do: backward_in_chunks(self.worker, index, states, do)
                )
            closed = self.base and self.base._backward(index)
            passing = lambda n, b: Backward(index, n, self.states(b), self.states(b, gradient))  # noqa: E731
            return self._passed(OpenBackward(index), passing, closed)

        key, index = self._like("backward", index, self.kind)
        return self._once(key, lambda: backward(index))

    def _passed(
        self,
        opening: Task,
        passing: Callable[[int, int], Task],
        closed: tuple[Takes, Any] | None,
        closing: type[Task] = CloseLayer,
    ) -> tuple[Takes, Any]:
        """What a layer takes that is opened, passed by samples and closed; and what closing it gave, if that is not
        known by now."""
        index = opening.layer
        with self._counting() as do:
            taken = {type(opening): same(do(opening)[0])}
            # The first micro-batch finds totals that are not there yet.
            pieces = [do(passing(number, batches))[0] for number, batches in enumerate((1, 2, 3))]
            taken[type(passing(0, 1))] = Rehearsed(pieces[1], pieces[2], self._sizes)
            if closed is not None:
                known, results = closed
                return taken | {kind: takes for kind, takes in known.items() if issubclass(kind, CloseLayer)}, results
            done, results = do(closing(index, len(pieces)))
        return taken | {closing: same(done)}, results

    def _passed_in_chunks(self, index: int, run: Callable[[Tensor, Do], tuple[Any, Any]]) -> tuple[Takes, Any]:
        """The same of a layer whose experts come a chunk at a time: ``run`` does the tasks, and gives the profile of
        what is no chunk's, and the first chunk's, which stands for all."""
        taken, (of_layer, of_chunk) = self._noted(lambda batches, do: run(self.states(batches), do))
        chunks = numbers_of_chunks(self.worker, index)
        of_all = {name: torch.cat([part] * len(chunks))[: chunks[-1].stop] for name, part in of_chunk.items()}
        return taken, ({**of_layer, **of_all}, {})

    def _noted(self, run: Callable[[int, Do], Any]) -> tuple[Takes, Any]:
        """What tasks take that are done one after another, on two numbers of micro-batches, and what comes of them."""
        taken: list[dict[type[Task], Done]] = []
        for batches in (2, 3):
            done: dict[type[Task], Done] = {}
            with self._counting() as do:

                def noted(task: Task, done: dict[type[Task], Done] = done, do: Any = do) -> Any:
                    done[type(task)], results = do(task)
                    return results

                given = run(batches, noted)
            taken.append(done)
        return {kind: Rehearsed(taken[0][kind], taken[1][kind], self._sizes) for kind in taken[0]}, given

    def _prune(self, index: int) -> Takes:
        def prune(index: int) -> Takes:
            (_, (_, carried)), (_, (profile, _)) = self._forward(index), self._backward(index)
            planned, propagates = self.shapes[index], self._block_length > 1

            def task(batches: int) -> Prune:
                states = self.states(batches)
                aims = self.worker.method.aims_at_dense(self.model.architecture.dense_shape(index))
                dense = {"dense_input": states, "dense_output": states} if aims else {}
                return Prune(index, states, planned, profile, carried, propagates, **dense)

            if self.worker.chunks(index) is not None:
                return self._noted(lambda batches, do: prune_in_chunks(self.worker, task(batches), do))[0]
            return {Prune: self._twice(task)}

        key, index = self._like("prune", index, self.kind, self.carries, self.rough_shape)
        return self._once(key, lambda: prune(index))

    def _twice(self, task: Callable[[int], Task]) -> Rehearsed:
        done = []
        for batches in (2, 3):
            with self._counting() as do:
                done.append(do(task(batches))[0])
        return Rehearsed(*done, self._sizes)

    def _pairs(self, index: int, shape: LayerShape) -> Tensor | None:
        """Rotary pairs that a pruned layer may have kept; None where it has all."""
        attention = shape.attention
        if attention is None or not self.model.architecture.names(index).narrows_pairs(attention):
            return None
        return torch.arange(attention.query_key_dim // 2).expand(attention.kv_heads, -1)

    def _pruned(self, index: int) -> DecoderLayer:
        """What pruning leaves of a layer."""
        shape, dtypes = self.shapes[index], self.model.stored_dtypes(index)
        return self.model.architecture.names(index).layer_from_state(
            {
                name: torch.empty(dims, dtype=dtypes.get(name, self.worker.runner.dtype))
                for name, dims in self.model.architecture.layer_tensors(index, shape).items()
            },
            shape,
            self._pairs(index, shape),
        )

    def _further_round(self, index: int) -> Mapping[type[Task], Takes]:
        pruned, gradient = self._pruned(index), self.worker.runner.gradient_dtype
        forward, _ = self._passed(OpenPruned(index, pruned), lambda n, b: Sweep(index, n, self.states(b)), None)
        passing = lambda n, b: Backward(index, n, self.states(b), self.states(b, gradient))  # noqa: E731
        backward, _ = self._passed(OpenPlaceOfPruned(index, pruned), passing, self._backward(index))
        return {OpenPruned: forward, OpenPlaceOfPruned: backward}

    def _gate_learning(self, index: int) -> Mapping[type[Task], Takes]:
        _, (profile, _) = self._forward(index)
        begun = gated_method(self.worker).even_profile(self.model.architecture.dense_shape(index))
        gates, gradient = {name: profile[name] for name in begun}, self.worker.runner.gradient_dtype
        opening = OpenGated(index, profile, gates)
        forward, _ = self._passed(opening, lambda n, b: Sweep(index, n, self.states(b)), None)
        passing = lambda n, b: Backward(index, n, self.states(b), self.states(b, gradient))  # noqa: E731
        backward, _ = self._passed(OpenGatedBackward(index, profile, gates), passing, None, CloseGated)
        return {OpenGated: forward, OpenGatedBackward: backward}

    def _learning(self, index: int) -> Takes:
        """What it takes a pruned layer to learn."""
        options, student = self.config.distill, self._pruned(index)
        if options.objective == "logits":
            return self._end_to_end(index, student)
        sizes = options.batch + 1, 2 * options.batch + 2
        done = []
        for samples in sizes:
            states = self._distillation_text(samples)
            with self._counting() as do:
                done.append(do(Distill(index, student, states, states, states))[0])
        return {Distill: Rehearsed(*done, sizes)}

    def _end_to_end(self, index: int, student: DecoderLayer) -> Takes:
        batch = self.config.distill.micro_batch(self.samples)
        small, large = self._distillation_text(batch), self._distillation_text(2 * batch)
        sizes, taken = (batch, 2 * batch), {}
        with self._counting() as do:
            taken[OpenDense] = same(do(OpenDense(index))[0])
            taken[Forward] = Rehearsed(
                *(do(Forward(index, number, states))[0] for number, states in enumerate((small, large))), sizes
            )
        with self._counting() as do:
            taken[OpenStudent] = same(do(OpenStudent(index, student, {}))[0])
            taken[ForwardOfStudent] = Rehearsed(
                *(do(Forward(index, number, states))[0] for number, states in enumerate((small, large))), sizes
            )
        with self._counting() as do:
            do(OpenStudent(index, student, {}))
            learnt = [do(Learn(index, n, states, states))[0] for n, states in enumerate((small, small, large))]
            taken[Learn] = Rehearsed(learnt[1], learnt[2], sizes)
            stepped, parameters = do(StepOptimizer(index, 3, 1e-4))
            taken[StepOptimizer] = same(stepped)
            taken[FoldIn] = same(do(FoldIn(index, student, parameters))[0])
        return taken

    def _distillation_text(self, samples: int) -> Tensor:
        hidden_size, dtype = self.model.architecture.hidden_size, self.worker.runner.dtype
        return torch.empty(samples, self.distillation_length, hidden_size, dtype=dtype)

    def _ends(self) -> Takes:
        with self._counting() as do:
            taken: dict[type[Task], Rehearsed] = {CheckOuter: same(do(CheckOuter())[0])}
        tokens = [torch.empty(batches * self.samples, self.length, dtype=torch.int32) for batches in (0, 1, 2, 3)]
        taken[Embed] = self._twice(lambda batches: Embed(tokens[batches]))
        if self.worker.has_gradient_pass:
            with self._counting() as do:
                taken[OpenLoss] = same(do(OpenLoss())[0])
                taken[LossGradient] = Rehearsed(
                    *(do(self._loss_gradient(runs))[0] for runs in (2, 3)),
                    (2 * TOKENS_AT_ONCE / self.length, 3 * TOKENS_AT_ONCE / self.length),
                )
                if self.config.rounds > 1:
                    taken[SampledGradient] = Rehearsed(
                        *(do(self._sampled_gradient(runs))[0] for runs in (2, 3)),
                        (2 * TOKENS_AT_ONCE / self.length, 3 * TOKENS_AT_ONCE / self.length),
                    )
                taken[CloseLoss] = same(do(CloseLoss())[0])
        is_end_to_end = self.config.distill is not None and self.config.distill.objective == "logits"
        if is_end_to_end or self._learns_gates:
            with self._counting() as do:
                taken[OpenEnd] = same(do(OpenEnd())[0])
                states = [self._end_of_sample(runs) for runs in (1, 2)]
                length = self.distillation_length if is_end_to_end else self.length
                sizes = TOKENS_AT_ONCE / length, 2 * TOKENS_AT_ONCE / length
                taken[Diverge] = Rehearsed(*(do(Diverge(some, some))[0] for some in states), sizes)
                taken[CloseEnd] = same(do(CloseEnd())[0])
        return taken

    def _loss_gradient(self, runs: int) -> LossGradient:
        """The task for a sample of so many runs of tokens whose logits exist at once."""
        states = self._end_of_sample(runs)
        return LossGradient(states, torch.empty(states.shape[:2], dtype=torch.int32))

    def _sampled_gradient(self, runs: int) -> SampledGradient:
        """The same of a further round."""
        return SampledGradient(self._end_of_sample(runs), self._end_of_sample(runs), 0)

    def _end_of_sample(self, runs: int) -> Tensor:
        hidden_size, dtype = self.model.architecture.hidden_size, self.worker.runner.dtype
        return torch.empty(1, runs * TOKENS_AT_ONCE, hidden_size, dtype=dtype)


class ForwardOfStudent(Forward):
    """A pruned layer's forward pass in end-to-end distillation, and not a dense one's."""


class CloseAfterForward(CloseLayer):
    """The end of a layer's dense pass where a gradient pass follows, which gives the profile."""


def same(done: Done) -> Rehearsed:
    """What a task takes that gets no samples."""
    return Rehearsed(done, done)


def values_of(result: Any) -> Any:
    """What a task gives, with lists in the place of dataclasses such as layers."""
    if isinstance(result, list | tuple):
        return [values_of(value) for value in result]
    if isinstance(result, Mapping):
        return {name: values_of(value) for name, value in result.items()}
    return values_of([*vars(result).values()]) if is_dataclass(result) else result
