"""Where in a layer activations and gradients are taken. A site says the part and the place; what the module there is
called is known to the model families."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, order=True)
class Site:
    """A place in a layer, at which an activation is (tokens, width).

    Attributes:
        part: "attention" or "ffn".
        place: which activation of the part.
        is_gradient: whether it is the loss's gradient there, and not the activation itself.
    """

    part: str
    place: str
    is_gradient: bool = False

    @property
    def gradient(self) -> Site:
        """The loss's gradient at the same place."""
        return replace(self, is_gradient=True)

    def __str__(self) -> str:
        return f"{self.part}.{self.place}" + (".gradient" if self.is_gradient else "")


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

#: All places, in the order in which most families' layers come to them.
SITES = (
    ATTENTION_INPUT, QUERIES, KEYS, VALUES, ATTENDED, ATTENTION_OUTPUT, FFN_INPUT, GATE, UP, NEURONS, FFN_OUTPUT,
)  # fmt: skip
