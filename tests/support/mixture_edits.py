"""Ways to prune a mixture of experts without a method, as :mod:`layer_edits` has them for other parts.

An expert that is gone is one that the router of the dense layer never chooses, since a bias of minus infinity is added
to its score. Most families' routers have no bias, so :func:`add_to_router` adds it for them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from layer_edits import Edit, kept, zeroed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from distprune.layers.parts import DecoderLayer, FeedForward
from distprune.methods.mixtures import best_experts, keep_experts, with_each
from distprune.methods.units import keep_neurons


def narrower_experts(width: int, shared_width: int | None = None) -> Edit:
    """Neurons go, others from each expert; from the shared network too, if it follows or another width is given."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        experts = layer.ffn
        each = [kept(experts.shape.width, width, seed=number) for number in range(experts.shape.count)]
        networks = [experts.expert(number) for number in range(len(each))]
        narrow = with_each(experts, [keep_neurons(ffn, neurons) for ffn, neurons in zip(networks, each, strict=True)])
        down = torch.stack([only(ffn, neurons).down.weight for ffn, neurons in zip(networks, each, strict=True)])
        dense = replace(experts, down=down)
        of_shared = experts.shared_count * width if experts.shared_count else shared_width
        if experts.shared is not None and of_shared is not None:
            neurons = kept(experts.shared.shape.width, of_shared)
            narrow = replace(narrow, shared=keep_neurons(experts.shared, neurons))
            dense = replace(dense, shared=only(experts.shared, neurons))
        return replace(layer, ffn=narrow), replace(layer, ffn=dense)

    return edit


def fewer_experts(count: int, groups: int = 1) -> Edit:
    """Whole experts go, as many from each group."""

    def edit(layer: DecoderLayer) -> tuple[DecoderLayer, DecoderLayer]:
        experts = layer.ffn
        worth = torch.rand(experts.shape.count, generator=torch.Generator().manual_seed(count))
        numbers = best_experts(worth, count, groups)
        never = torch.full_like(worth, -torch.inf).index_fill(0, numbers, 0.0)
        router, correction = experts.router, experts.correction
        dense = replace(
            experts,
            router=replace(router, bias=never if router.bias is None else router.bias + never),
            correction=None if correction is None else correction + never,
        )
        return replace(layer, ffn=keep_experts(experts, numbers)), replace(layer, ffn=dense)

    return edit


def only(ffn: FeedForward, neurons: Tensor) -> FeedForward:
    """The network whose other neurons say nothing."""
    return replace(ffn, down=zeroed(ffn.down, columns=neurons))


# ---------------------------------------------------------------- routers that have no bias


class _Biased(TorchFunctionMode):
    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self._weight, self._bias = weight, bias

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        return output + self._bias if func is F.linear and args[1] is self._weight else output


def add_to_router(router: nn.Module, bias: Tensor) -> None:
    """Let a float32 router add a bias to its scores, whatever it makes of them."""
    forward = router.forward

    def biased(*args, **kwargs):
        with _Biased(router.weight, bias):
            return forward(*args, **kwargs)

    router.forward = biased
