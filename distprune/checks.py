"""Every result must be finite numbers. What lies on a GPU is looked at there."""

from __future__ import annotations

from torch import Tensor

from distprune.checkpoint import is_finite
from distprune.decoder_layer import DecoderLayer, state_of
from distprune.errors import InputError


def check_hidden_states(hidden_states: Tensor, index: int) -> None:
    if not is_finite(hidden_states):
        dtype = str(hidden_states.dtype).removeprefix("torch.")
        raise InputError(
            f"layer {index}: its hidden states overflow in {dtype}. Give another --dtype, such as float32."
        )


def check_gradient(gradient: Tensor, place: str) -> None:
    if not is_finite(gradient):
        dtype = str(gradient.dtype).removeprefix("torch.")
        raise InputError(f"{place}: the loss's gradients overflow in {dtype}. Choose a method that needs none.")


def check_solution(layer: DecoderLayer, index: int) -> None:
    """Raises ``ArithmeticError`` when a solve overflowed, rather than write a broken checkpoint."""
    for name, tensor in state_of(layer).items():
        if not is_finite(tensor):
            raise ArithmeticError(f"pruning layer {index} gave NaN or infinite values in {name}")
