"""Layers of any shape with random weights: what they take to run depends on no value."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distprune.layers.architecture import Architecture, resized_ffn
from distprune.layers.module import build_module
from distprune.layers.parts import DecoderLayer, map_tensors
from distprune.layers.resized import resize_attention
from distprune.layers.shapes import LayerShape

#: Small, so that nothing overflows in float16.
DEVIATION = 0.02


def random_layer(
    model: Architecture, index: int, shape: LayerShape, device: torch.device, dtype: torch.dtype
) -> nn.Module:
    """Layer ``index`` in another shape, as the module that a pruned model has for it, with weights of its own."""
    dense = model.dense_layer(index)
    attention = resize_attention(dense.attention, shape.attention) if dense.attention and shape.attention else None
    ffn = resized_ffn(dense.ffn, shape.ffn) if dense.ffn and shape.ffn else None
    layer = map_tensors(DecoderLayer(attention, ffn, dense.rest), lambda tensor: values_for(tensor, device, dtype))
    return build_module(model, index, layer, dtype).to(device)


def values_for(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Values for a tensor that has none: random numbers, or which rotary pairs a head has kept."""
    if tensor.is_floating_point():
        return torch.randn(tensor.shape, device=device, dtype=dtype) * DEVIATION
    return torch.arange(tensor.shape[-1], device=device).expand(tensor.shape)
