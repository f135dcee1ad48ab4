"""Experts that are stored in mxfp4, as gpt-oss' are, and read in bfloat16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from distprune.checkpoint.infos import TensorInfo, unpacked_info
from distprune.checkpoint.quantization import RELEASE
from distprune.errors import InputError

BLOCKS, SCALES = "_blocks", "_scales"
#: Bytes that hold the numbers that one scale is for, two of them each.
BLOCK_BYTES = 16


def with_blocks(tensors: Mapping[str, TensorInfo]) -> dict[str, TensorInfo]:
    """The tensors as they are read: blocks joined with their scales, under the name that the parameter has.

    Raises:
        InputError: blocks and scales don't belong together, or are not those of experts.
    """
    names = {name.removesuffix(BLOCKS) for name in tensors if name.endswith(BLOCKS) and _scales_of(name) in tensors}
    joined = {name: _joined(name, tensors[name + BLOCKS], tensors[name + SCALES]) for name in names}
    parts = {name + ending for name in names for ending in (BLOCKS, SCALES)}
    return {name: info for name, info in tensors.items() if name not in parts} | joined


def unpacked(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers of blocks (E, rows, G, 16) with scales (E, rows, G): (E, 32 G, rows) in bfloat16.

    transformers' own code, one expert after another, since it takes several times the memory of the result.
    """
    experts, rows, groups, size = blocks.shape
    result = torch.empty(experts, 2 * size * groups, rows, dtype=torch.bfloat16)
    for expert in range(experts):
        result[expert] = convert_moe_packed_tensors(blocks[expert, None], scales[expert, None])[0]
    return result


def _scales_of(blocks: str) -> str:
    return blocks.removesuffix(BLOCKS) + SCALES


def _joined(name: str, blocks: TensorInfo, scales: TensorInfo) -> TensorInfo:
    are_bytes = blocks.dtype == scales.dtype == torch.uint8
    if not (are_bytes and len(blocks.shape) == 4 and blocks.shape == (*scales.shape, BLOCK_BYTES)):
        raise InputError(
            f"{blocks.file}: tensor {name}{BLOCKS} has shape {blocks.shape}, and {name}{SCALES} {scales.shape}. Blocks "
            f"of {BLOCK_BYTES} bytes (experts, rows, groups, {BLOCK_BYTES}) with a scale each could be read. {RELEASE}"
        )
    return unpacked_info(blocks, scales)
