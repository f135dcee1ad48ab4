"""Weights that are stored in fp8 with their scales, and read in bfloat16."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from distprune.checkpoint.infos import TensorInfo, with_scale
from distprune.checkpoint.quantization import RELEASE, Fp8Scheme
from distprune.errors import InputError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
#: What the scale of a module's ``weight`` may be called, and that of a parameter after its own name. Whatever it is
#: called, it is what the weight is multiplied by.
WEIGHT_SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
PARAMETER_SCALES = ("_scale_inv", "_scale")
#: What quantizes a module's activations at run time, beside its weight, and a key/value cache.
ACTIVATION_SCALES = ("input_scale", "output_scale", "activation_scale", "qscale_act")
CACHE_SCALES = (".k_scale", ".v_scale")
PIECE = 2**20  # numbers that are dequantized at once, few enough for a cache


def with_scales(tensors: Mapping[str, TensorInfo], scheme: Fp8Scheme) -> dict[str, TensorInfo]:
    """The tensors as they are read: those in fp8 joined with their scales, and no scales beside them.

    Raises:
        InputError: a scale fits none of the ways in which the model says that it scales.
    """
    scale_of = {
        name: scale
        for name, info in tensors.items()
        for scale in _names_of_scales(name)
        if info.dtype in FP8 and scale in tensors
    }
    beside = {*scale_of.values()} | {_stem(name) + ending for name in scale_of for ending in ACTIVATION_SCALES}
    return {
        name: _scaled(name, info, tensors[scale_of[name]], scheme) if name in scale_of else info
        for name, info in tensors.items()
        if name not in beside and not (scheme.has_cache_scales and name.endswith(CACHE_SCALES))
    }


def dequantized(numbers: Tensor, scale: Tensor, block: tuple[int, ...]) -> Tensor:
    """Numbers in fp8 times the scales of the blocks that they are in, in bfloat16. Works piece by piece."""
    result = torch.empty(numbers.shape, dtype=torch.bfloat16)
    at_once = max(1, PIECE * len(numbers) // max(numbers.numel(), 1))
    for begin in range(0, len(numbers), at_once):
        rows = torch.arange(begin, min(begin + at_once, len(numbers)))
        result[begin : begin + at_once] = dequantized_rows(numbers, scale, block, rows)
    return result


def dequantized_rows(numbers: Tensor, scale: Tensor, block: tuple[int, ...], rows: Tensor) -> Tensor:
    """Some rows of what :func:`dequantized` gives; ``rows`` holds int64 indices of any shape."""
    index = rows.flatten()
    chosen = numbers.view(torch.uint8)[index].view(numbers.dtype).float()  # fp8 itself can't be indexed everywhere
    factors = scale.reshape(_grid(numbers.shape, block)).float()[index // block[0]]
    for dim in range(1, numbers.dim()):
        if factors.shape[dim] > 1:
            factors = factors.repeat_interleave(block[dim], dim).narrow(dim, 0, chosen.shape[dim])
    return (chosen * factors).to(torch.bfloat16).reshape(*rows.shape, *numbers.shape[1:])


def _names_of_scales(name: str) -> list[str]:
    if name.endswith(".weight"):
        return [name.removesuffix("weight") + ending for ending in WEIGHT_SCALES]
    return [name + ending for ending in PARAMETER_SCALES]


def _stem(name: str) -> str:
    """What the names of a weight's activation scales begin with."""
    return name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"


def _scaled(name: str, numbers: TensorInfo, scale: TensorInfo, scheme: Fp8Scheme) -> TensorInfo:
    block = _find_block(numbers.shape, scale.shape, scheme)
    if block is None or not scale.dtype.is_floating_point:
        raise InputError(
            f"{scale.file}: the scale of tensor {name} has shape {scale.shape} and dtype "
            f"{str(scale.dtype).removeprefix('torch.')}. The tensor has shape {numbers.shape}: one scale, one a row, "
            f"or one for each block that config.json's quantization_config names could be read. {RELEASE}"
        )
    return with_scale(numbers, scale, block)


def _find_block(shape: tuple[int, ...], scale: tuple[int, ...], scheme: Fp8Scheme) -> tuple[int, ...] | None:
    """The shape that one scale covers: the whole tensor, or of its last two dimensions all, a row or a block."""
    if 0 in shape or not shape:
        return None
    if math.prod(scale) == 1:
        return shape
    if len(shape) == 1:
        return None
    *outer, rows, columns = shape
    for block in ((rows, columns), (1, columns), *scheme.blocks):
        covered = (*(1 for _ in outer), *block)
        if _without_ones_at_the_end(_grid(shape, covered)) == _without_ones_at_the_end(scale):
            return covered
    return None


def _grid(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """How many blocks there are in each dimension; the last may be cut off."""
    return tuple(math.ceil(size / covered) for size, covered in zip(shape, block, strict=True))


def _without_ones_at_the_end(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape
