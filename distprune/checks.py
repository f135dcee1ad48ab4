"""Every result must be finite numbers. What lies on a GPU is looked at there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass

import torch
from torch import Tensor

from distprune.checkpoint import is_finite
from distprune.errors import InputError
from distprune.layers.parts import DecoderLayer


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


@contextmanager
def solving(method: str, index: int) -> Iterator[None]:
    """Names the layer whose moments a method can't solve for.

    Raises:
        InputError: in place of one that names no layer, and of what linear algebra gives up with.
    """
    try:
        yield
    except InputError as error:
        raise InputError(f"layer {index}: {error}") from error
    except torch.linalg.LinAlgError as error:
        raise InputError(
            f"layer {index}: method {method} can't solve for what the calibration set shows of it ({error}). Raise the "
            "method's damping (--option), or calibrate on more text."
        ) from error


def check_solution(layer: DecoderLayer, index: int) -> None:
    """See that a solve has not overflowed, rather than write a broken checkpoint.

    Raises:
        ArithmeticError: it has; names the tensor.
    """

    for name, tensor in named_tensors(layer):
        if not tensor.is_meta and not is_finite(tensor):
            raise ArithmeticError(f"pruning layer {index} gave NaN or infinite values in {name}")


def named_tensors(value: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a layer, or of a part of one, by the fields that lead to them: "attention.output.weight"."""
    if isinstance(value, Tensor):
        yield name, value
    elif is_dataclass(value) or isinstance(value, Mapping):
        inner = (
            value.items()
            if isinstance(value, Mapping)
            else ((own.name, getattr(value, own.name)) for own in fields(value))
        )
        for own, each in inner:
            yield from named_tensors(each, f"{name}.{own}" if name else own)
