"""Where a mixture of experts keeps its tensors, in transformers' one module for all experts of a layer.

That module says itself how they lie in it: whether matrices are transposed, and whether gate and up projection lie one
after the other or row by row. Its tensors are turned into those of a part, and back, without a copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from distprune.layers.parts import Experts, FeedForward, Linear
from distprune.layers.shapes import ExpertsShape

#: The module with all experts, within the mixture's.
EXPERTS = "experts"
#: What families call the router, what is added to its scores, and the network that every token passes through.
ROUTERS = ("gate", "router")
CORRECTIONS = ("e_score_correction_bias",)
SHARED = ("shared_experts", "shared_expert")


@dataclass(frozen=True)
class ExpertNames:
    """The names of a mixture's tensors within its module, and how they lie.

    Attributes:
        router: the module of the router.
        correction: the tensor that is added to its scores when it chooses; None where there is none.
        correction_dims: how many dimensions it has, of which the last is the experts'.
        shared: the module that every token passes through; None where there is none.
        is_gated: whether experts have gates.
        is_transposed: whether matrices are (in, out).
        is_interleaved: whether the rows of gate and up projection take turns.
    """

    router: str
    correction: str | None
    correction_dims: int
    shared: str | None
    is_gated: bool
    is_transposed: bool
    is_interleaved: bool

    @property
    def inputs(self) -> str:
        """The tensor with the projections that read an expert's input."""
        return f"{EXPERTS}.gate_up_proj" if self.is_gated else f"{EXPERTS}.up_proj"

    @property
    def down(self) -> str:
        return f"{EXPERTS}.down_proj"

    # ---------------------------------------------------------------- as a part has them

    def take(self, state: dict[str, Tensor], parent: str, shared: FeedForward | None, shape: ExpertsShape) -> Experts:
        """The part, out of a layer's state; ``parent`` with a dot at the end stands before the names."""

        def pop(name: str | None) -> Tensor | None:
            return None if name is None else state.pop(parent + name, None)

        inputs, down = state.pop(parent + self.inputs), state.pop(parent + self.down)
        input_bias, correction = pop(f"{self.inputs}_bias"), pop(self.correction)
        return Experts(
            router=Linear(state.pop(f"{parent}{self.router}.weight"), pop(f"{self.router}.bias")),
            inputs=self._apart(inputs.mT if self.is_transposed else inputs),
            down=down.mT if self.is_transposed else down,
            input_bias=None if input_bias is None else self._apart(input_bias),
            down_bias=pop(f"{self.down}_bias"),
            correction=None if correction is None else correction.flatten(),
            shared=shared,
            shared_count=shape.shared_count,
            per_token=shape.per_token,
            groups=shape.groups,
            fewest=shape.fewest,
        )

    def state_of(self, experts: Experts) -> dict[str, Tensor]:
        """The inverse of :meth:`take` except for what is shared, by names within the mixture's module."""
        inputs, down = self._joined(experts.inputs), experts.down
        correction, bias = experts.correction, experts.input_bias
        state: dict[str, Tensor | None] = {
            f"{self.router}.weight": experts.router.weight,
            f"{self.router}.bias": experts.router.bias,
            self.inputs: inputs.mT if self.is_transposed else inputs,
            self.down: down.mT if self.is_transposed else down,
            f"{self.inputs}_bias": None if bias is None else self._joined(bias),
            f"{self.down}_bias": experts.down_bias,
        }
        if self.correction is not None and correction is not None:
            state[self.correction] = correction.reshape((1,) * (self.correction_dims - 1) + (-1,))
        return {name: tensor.contiguous() for name, tensor in state.items() if tensor is not None}

    def _apart(self, inputs: Tensor) -> Tensor:
        """(E, m · f, ..) -> (E, m, f, ..)"""
        projections = 2 if self.is_gated else 1
        if self.is_interleaved:
            return inputs.unflatten(1, (-1, projections)).transpose(1, 2)
        return inputs.unflatten(1, (projections, -1))

    def _joined(self, inputs: Tensor) -> Tensor:
        return (inputs.transpose(1, 2) if self.is_interleaved else inputs).flatten(1, 2)


def find_experts(mixture: nn.Module) -> ExpertNames | None:
    """Where a module has its experts; None where it has none that transformers runs through its one interface."""
    experts: Any = getattr(mixture, EXPERTS, None)
    routers = [name for name in ROUTERS if hasattr(getattr(mixture, name, None), "weight")]
    if not routers or not hasattr(experts, "is_transposed") or getattr(experts, "has_post_expert_norm", False):
        return None
    corrections = {name: tensor for name, tensor in mixture.state_dict().items() if name.endswith(CORRECTIONS)}
    correction = next(iter(corrections), None)
    shared = [name for name in SHARED if isinstance(getattr(mixture, name, None), nn.Module)]
    return ExpertNames(
        router=routers[0],
        correction=correction,
        correction_dims=corrections[correction].ndim if correction else 0,
        shared=shared[0] if shared else None,
        is_gated=experts.has_gate,
        is_transposed=experts.is_transposed,
        is_interleaved=not experts.is_concatenated,
    )
