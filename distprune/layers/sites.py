"""Where in a layer activations and gradients are taken. A site says the part and the place; what the module there is
called is known to the model families."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Site:
    """A place in a layer, at which an activation is (tokens, width).

    Attributes:
        part: "attention" or "ffn", or "layer" for the layer as a whole.
        place: which activation of the part.
        is_gradient: whether it is the loss's gradient there, and not the activation itself.
        expert: which expert of a mixture it is of, at the tokens that were routed to it.
    """

    part: str
    place: str
    is_gradient: bool = False
    expert: int | None = None

    @property
    def gradient(self) -> Site:
        """The loss's gradient at the same place."""
        return replace(self, is_gradient=True)

    def of(self, expert: int) -> Site:
        """The same place in an expert of a mixture."""
        return replace(self, expert=expert)

    def __str__(self) -> str:
        number = "" if self.expert is None else f"[{self.expert}]"
        return f"{self.part}.{self.place}{number}" + (".gradient" if self.is_gradient else "")


#: The input of queries, keys and values, (tokens, d).
ATTENTION_INPUT = Site("attention", "input")
#: The outputs of the projections, before norms of heads and rotary embedding, (tokens, heads · width).
QUERIES = Site("attention", "queries")
KEYS = Site("attention", "keys")
VALUES = Site("attention", "values")
#: The output projection's input, (tokens, h · v), and its output, (tokens, d).
ATTENDED = Site("attention", "attended")
ATTENTION_OUTPUT = Site("attention", "output")
#: The feed-forward network's input, (tokens, d); what gate and up give, (tokens, f); the down projection's input,
#: (tokens, f); and the network's output, its branch's included, (tokens, d).
FFN_INPUT = Site("ffn", "input")
GATE = Site("ffn", "gate")
UP = Site("ffn", "up")
NEURONS = Site("ffn", "neurons")
FFN_OUTPUT = Site("ffn", "output")

#: The hidden states at the layer's input and at its output, (tokens, d).
LAYER_INPUT = Site("layer", "input")
LAYER_OUTPUT = Site("layer", "output")
#: What the dense model's hidden states after the part, on its own input, are more than the layer's, (tokens, d). No
#: module has them: whoever runs a layer beside the dense model does.
ATTENTION_ERROR = Site("attention", "error")
FFN_ERROR = Site("ffn", "error")

#: Of each expert, at the tokens that were routed to it: its input, (tokens, d); what its gate and up projection give,
#: (tokens, f); its neurons and its output, both times the router's weight, (tokens, f) and (tokens, d); and that
#: weight, (tokens, 1).
EXPERT_INPUT = Site("ffn", "expert_input")
EXPERT_GATE = Site("ffn", "expert_gate")
EXPERT_UP = Site("ffn", "expert_up")
EXPERT_NEURONS = Site("ffn", "expert_neurons")
EXPERT_OUTPUT = Site("ffn", "expert_output")
ROUTER_WEIGHT = Site("ffn", "router_weight")
#: The same as GATE, UP, NEURONS and FFN_OUTPUT of the network that every token passes through beside the experts.
SHARED_GATE = Site("ffn", "shared_gate")
SHARED_UP = Site("ffn", "shared_up")
SHARED_NEURONS = Site("ffn", "shared_neurons")
SHARED_OUTPUT = Site("ffn", "shared_output")

#: All places, in the order in which most families' layers come to them.
SITES = (
    ATTENTION_INPUT, QUERIES, KEYS, VALUES, ATTENDED, ATTENTION_OUTPUT, FFN_INPUT, GATE, UP, NEURONS, FFN_OUTPUT,
)  # fmt: skip
