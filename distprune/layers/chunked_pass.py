"""Passes of a layer whose experts come a chunk at a time, forward and backward.

The layer's own module runs with a function in the place of its experts, which notes what they are called with or gives
what they give. In between, each chunk of experts runs as the family's own module for so many experts, and adds to what
all of them give. A pair of a token and an expert is a row of its own there, so that no chunk sees more than its tokens.
The gradient goes the other way round: to the experts' output, through one chunk after the other, to the input.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distprune.checks import check_gradient, check_hidden_states
from distprune.layers.determinism import deterministic_attention
from distprune.layers.expert_names import EXPERTS
from distprune.layers.expert_places import ExpertPlaces
from distprune.layers.module import EndOfPass, build_experts, tapped
from distprune.layers.parts import DecoderLayer, Experts, map_tensors
from distprune.layers.sites import FFN_OUTPUT, Site

if TYPE_CHECKING:
    from distprune.layers.runner import LayerRunner, Observer

#: What stands in the place of the experts: (hidden states, numbers of the chosen experts, weights) -> output.
StandIn = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Sites that the experts' output reaches, and that whatever is in its place would falsify.
AFTER_EXPERTS = {FFN_OUTPUT, FFN_OUTPUT.gradient}


@dataclass
class Routed:
    """What the experts of a layer are called with in one micro-batch of T tokens, and what they give.

    Attributes:
        batch: its samples.
        inputs: (T, d).
        chosen: the numbers of each token's experts, (T, k).
        weights: theirs, (T, k).
        order: the T · k pairs of a token and one of its choices, sorted by expert.
        starts: where the pairs of each expert begin there, and where those of the last end, (E + 1,).
        total: the sum of the outputs of the experts so far, (T, d) in float32; None before the first.
        at_inputs, at_weights: the gradients of the experts so far, (T, d) in float32 and (T, k); None before the first.
    """

    batch: slice
    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    order: Tensor
    starts: list[int]
    total: Tensor | None = None
    at_inputs: Tensor | None = None
    at_weights: Tensor | None = None

    @classmethod
    def of(cls, batch: slice, inputs: Tensor, chosen: Tensor, weights: Tensor, experts: int) -> Routed:
        """From what the experts of a layer that has so many are called with."""
        numbers, order = torch.sort(chosen.flatten(), stable=True)
        starts = [0, *accumulate(torch.bincount(numbers, minlength=experts).tolist())]
        return cls(batch, inputs, chosen, weights, order, starts)

    def add(self, tokens: Tensor, output: Tensor) -> None:
        """Add to the total what experts give at these tokens, (n,) and (n, d), in their order."""
        if self.total is None:
            self.total = torch.zeros(self.inputs.shape, dtype=torch.float32, device=self.inputs.device)
        self.total.index_add_(0, tokens, output.to(self.total))

    def given(self, like: Tensor) -> Tensor:
        """The total in the dtype and on the device of a tensor of its shape."""
        return torch.zeros_like(like) if self.total is None else self.total.to(like)

    def rows(self, own: range) -> tuple[Tensor, Tensor]:
        """The pairs of tokens and some experts: which token, and which of its k choices."""
        order, choices = self.order[self.starts[own.start] : self.starts[own.stop]], self.chosen.shape[1]
        return order // choices, order % choices


class ExpertPasses:
    """Passes through some experts of a layer at a time, of what all of them are called with.

    Args:
        runner: says where, and in what micro-batches.
        index: which layer of the model it is.
        routed: what the experts are called with, one micro-batch after the other.
        dtype: what they run in; by default the runner's.
    """

    def __init__(self, runner: LayerRunner, index: int, routed: list[Routed], dtype: torch.dtype | None = None):
        self._runner, self.index, self.routed = runner, index, routed
        self._dtype = dtype or runner.dtype

    @torch.no_grad()
    def outputs(
        self, own: range, experts: Experts, observe: Observer | None = None, sites: Collection[Site] = ()
    ) -> list[Tensor]:
        """What some experts give at the tokens that are routed to them, of every micro-batch, (n, d).

        Args:
            own: their numbers in the layer.
            experts: only these.
            observe, sites: as in :meth:`LayerRunner.run`; theirs.
        """
        passes = self._through(own, experts, observe, sites)
        return [output.to(routed.inputs.device) for routed, _, _, output in passes]

    def add_outputs(self, own: range, outputs: Iterable[Tensor]) -> None:
        """Add what :meth:`outputs` has given, here or elsewhere."""
        for routed, output in zip(self.routed, outputs, strict=True):
            routed.add(routed.rows(own)[0], output)

    @torch.no_grad()
    def observe(self, own: range, experts: Experts, observe: Observer, sites: Collection[Site]) -> None:
        """See what passes through some experts, and add nothing."""
        for _ in self._through(own, experts, observe, sites):
            pass

    def gradients(
        self,
        own: range,
        experts: Experts,
        at_totals: Iterable[Tensor],
        observe: Observer | None = None,
        sites: Collection[Site] = (),
    ) -> list[tuple[Tensor, Tensor]]:
        """The loss's gradients at what some experts are called with: tokens (n, d) and their weights (n,), by batch.

        Args:
            own, experts, observe, sites: as of :meth:`outputs`.
            at_totals: the gradient at what all experts give together, (T, d), of every micro-batch.
        """
        found, device = [], torch.device("cpu")
        with torch.enable_grad():
            passes = self._through(own, experts, observe, sites)
            for at_total, (routed, (tokens, _), leaves, output) in zip(at_totals, passes, strict=True):
                device = routed.inputs.device
                at_inputs, at_weights = torch.autograd.grad(output, leaves, at_total[tokens].to(output))
                found.append((at_inputs.to(device), at_weights.squeeze(1).to(device)))
        return found

    def add_gradients(self, own: range, gradients: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Add what :meth:`gradients` has given, here or elsewhere."""
        for routed, (at_inputs, at_weights) in zip(self.routed, gradients, strict=True):
            if routed.at_inputs is None or routed.at_weights is None:
                routed.at_inputs = torch.zeros_like(routed.inputs, dtype=torch.float32)
                routed.at_weights = torch.zeros_like(routed.weights)
            rows = routed.rows(own)
            routed.at_inputs.index_add_(0, rows[0], at_inputs.to(routed.at_inputs))
            routed.at_weights[rows] = at_weights.to(routed.at_weights)

    def _through(
        self, own: range, experts: Experts, observe: Observer | None, sites: Collection[Site]
    ) -> Iterator[tuple[Routed, tuple[Tensor, Tensor], tuple[Tensor, Tensor], Tensor]]:
        """Of every micro-batch: its rows, what some experts are called with at them, and what they give, weighted."""
        device, seen = self._runner.device, dict[Site, Tensor]()
        moved = map_tensors(experts, lambda tensor: tensor.to(device))
        module = build_experts(self._runner.architecture, self.index, moved, self._dtype).requires_grad_(False)
        in_chunk = {site.of(site.expert - own.start): site for site in sites if site.expert is not None}
        places = ExpertPlaces(module, in_chunk, lambda site, seen_there: seen.update({in_chunk[site]: seen_there}))
        handles = [*places.watch()] if sites else []
        try:
            for routed in self.routed:
                rows = routed.rows(own)
                numbers = (routed.chosen[rows] - own.start).unsqueeze(1).to(device)
                leaves = routed.inputs[rows[0]].to(device), routed.weights[rows].unsqueeze(1).to(device)
                if torch.is_grad_enabled():
                    leaves = leaves[0].requires_grad_(), leaves[1].requires_grad_()
                yield routed, rows, leaves, module(leaves[0], numbers, leaves[1])
                if observe:
                    observe(seen)
                seen.clear()
        finally:
            for handle in handles:
                handle.remove()


class ChunkedPass(ExpertPasses):
    """One layer's passes over hidden states.

    Forward: :meth:`route`, :meth:`outputs` of every chunk and :meth:`add_outputs`, :meth:`output`. Backward after that:
    :meth:`backward_to_experts`, :meth:`gradients` of every chunk and :meth:`add_gradients`, :meth:`backward_to_input`.

    Args:
        runner: says where, and in what micro-batches.
        layer: its experts' own tensors are not looked at.
        index: which layer of the model it is.
        hidden_states: at its input, (samples, length, d). What is noted of the experts is kept on their device.
        dtype: what the layer runs in; by default the runner's.
        routed: what its experts are called with, where that was noted before.
    """

    def __init__(
        self,
        runner: LayerRunner,
        layer: DecoderLayer,
        index: int,
        hidden_states: Tensor,
        dtype: torch.dtype | None = None,
        routed: Iterable[Routed] = (),
    ):
        super().__init__(runner, index, [*routed], dtype)
        self._states = hidden_states
        self._layer, self._module = layer, self._build(layer)

    def _build(self, layer: DecoderLayer) -> nn.Module:
        return self._runner.build(layer, self.index, self._dtype).requires_grad_(False)

    # ---------------------------------------------------------------- forward

    @torch.no_grad()
    def route(self, observe: Observer | None = None, sites: Collection[Site] = ()) -> None:
        """Note what the experts are called with. ``sites`` are none of experts, nor of what these give."""
        assert not AFTER_EXPERTS & {*sites}

        def note(inputs: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
            device = self._states.device
            called_with = inputs.to(device), chosen.to(device), weights.to(device)
            self.routed.append(Routed.of(batch, *called_with, count))
            if not sites:
                raise EndOfPass
            return torch.zeros_like(inputs)

        assert isinstance(self._layer.ffn, Experts)
        count = self._layer.ffn.shape.count
        with self._standing_in(note), self._tapped(sites) as seen:
            for batch in self._batches():
                with suppress(EndOfPass):
                    self._forward(self._given(batch))
                if observe:
                    observe(seen)
                    seen.clear()

    @torch.no_grad()
    def output(
        self,
        observe: Observer | None = None,
        sites: Collection[Site] = (),
    ) -> Tensor:
        """The layer's output hidden states, of the input's shape, dtype and on its device, when all chunks were added.

        Args:
            observe, sites: as in :meth:`LayerRunner.run`; none of experts.

        Raises:
            InputError: the activations exceed the range of the dtype.
        """

        def give(inputs: Tensor, chosen: Tensor, _: Tensor) -> Tensor:
            if not torch.equal(chosen.to(routed.chosen.device), routed.chosen):
                raise AssertionError(f"layer {self.index} calls other experts than were run for it")
            return routed.given(inputs)

        output = self._runner.empty_like(self._states)
        with self._standing_in(give), self._tapped(sites) as seen:
            for routed in self.routed:
                given = self._forward(self._given(routed.batch))
                check_hidden_states(given, self.index)
                output[routed.batch] = given
                if observe:
                    observe(seen)
                    seen.clear()
        return output

    # ---------------------------------------------------------------- backward

    def backward_to_experts(
        self, gradient: Tensor, observe: Observer | None = None, sites: Collection[Site] = ()
    ) -> list[Tensor]:
        """Take the loss's gradient from the layer's output, (samples, length, d), to what all experts give together.

        ``sites`` are of the mixture's output.

        Returns:
            The gradient there, (T, d), of every micro-batch.
        """
        assert {*sites} <= AFTER_EXPERTS

        at_totals: list[Tensor] = []
        totals: list[Tensor] = []

        def give(inputs: Tensor, *_: Tensor) -> Tensor:
            totals[:] = [routed.given(inputs).requires_grad_()]
            return totals[0]

        with self._standing_in(give), self._tapped(sites) as seen:
            for routed in self.routed:
                with torch.enable_grad():
                    output = self._forward(self._given(routed.batch))
                with deterministic_attention():
                    [at_total] = torch.autograd.grad(output, totals, gradient[routed.batch].to(output))
                at_totals.append(at_total.to(self._states.device))
                if observe:
                    observe(seen)
                    seen.clear()
        return at_totals

    def backward_to_input(
        self, gradient: Tensor, observe: Observer | None = None, sites: Collection[Site] = ()
    ) -> Tensor:
        """The loss's gradient at the layer's input, of ``gradient``'s shape, dtype and on its device.

        Args:
            gradient: at the layer's output again.
            observe, sites: as in :meth:`LayerRunner.backward`; none of experts.

        Raises:
            InputError: the gradients exceed the range of the dtype.
        """
        calls: list[Tensor] = []

        def give(inputs: Tensor, _: Tensor, weights: Tensor) -> Tensor:
            calls[:] = inputs, weights
            return routed.given(inputs)

        result = self._runner.empty_like(gradient)
        with self._standing_in(give), self._tapped(sites) as seen:
            for routed in self.routed:
                given = self._given(routed.batch).requires_grad_()
                with torch.enable_grad():
                    output = self._forward(given)
                ends = [(output, gradient[routed.batch]), (calls[0], routed.at_inputs), (calls[1], routed.at_weights)]
                ends = [(end, at_end.to(end)) for end, at_end in ends if end.requires_grad and at_end is not None]
                outputs, at_outputs = map(list, zip(*ends, strict=True))
                with deterministic_attention():
                    [at_input] = torch.autograd.grad(outputs, given, at_outputs)
                check_gradient(at_input, f"layer {self.index}")
                result[routed.batch] = at_input
                if observe:
                    observe(seen)
                seen.clear()
        return result

    # ---------------------------------------------------------------- what both have in common

    def _batches(self) -> Iterator[slice]:
        size = self._runner.micro_batch
        for start in range(0, len(self._states), size):
            yield slice(start, start + size)

    def _given(self, batch: slice) -> Tensor:
        """The layer's input of a micro-batch: a copy, since what was made in inference mode has no gradients."""
        return self._states[batch].to(self._runner.device, self._dtype, copy=True)

    def _forward(self, given: Tensor) -> Tensor:
        return self._runner.forward(self._module, self.index, given)

    def _tapped(self, sites: Collection[Site]) -> AbstractContextManager[dict[Site, Tensor]]:
        return tapped(self._module, self._runner.architecture.family, self._layer.shape, sites)

    @contextmanager
    def _standing_in(self, stand_in: StandIn) -> Iterator[None]:
        """Inside, a function runs in the place of the layer's experts."""
        experts = self._module.get_submodule(f"{self._runner.architecture.family.ffn}.{EXPERTS}")
        experts.forward = lambda *given, **named: stand_in(*given, *named.values())
        try:
            yield
        finally:
            del experts.forward
