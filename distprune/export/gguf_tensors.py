"""The tensors of a Llama as GGUF files hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distprune.checkpoint import Checkpoint
from distprune.errors import InputError
from distprune.layers.architecture import Architecture

QUANTIZATIONS = {np.float16: GGMLQuantizationType.F16, np.float32: GGMLQuantizationType.F32}


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's name and shape in the file, its element type there, and where it comes from."""

    name: str
    shape: tuple[int, ...]
    dtype: type[np.floating]
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def gguf_tensors(checkpoint: Checkpoint, architecture: str, dtype: str) -> Iterator[GgufTensor]:
    """All tensors of the file, in the model's order.

    Args:
        checkpoint: of the model.
        architecture: llama.cpp's name for it, "llama" or "deci".
        dtype: of matrices, "f16" or "f32"; vectors are f32.

    Raises:
        InputError: the checkpoint lacks a tensor.
    """
    config, model = checkpoint.config, Architecture(checkpoint.config)
    expected = model.outer_tensors()
    for index in range(model.num_layers):
        tensors = model.layer_tensors(index, model.dense_shape(index))
        expected |= {model.layer_prefix(index) + name: dims for name, dims in tensors.items()}
    checkpoint.check_shapes(expected)
    kind = gguf.MODEL_ARCH.DECI if architecture == "deci" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    scaling = rope_scaling(config)
    if (scaling != 1).any():
        yield GgufTensor("rope_freqs.weight", tuple(scaling.shape), np.float32, lambda: scaling)
    matrix = np.float16 if dtype == "f16" else np.float32
    for name, shape in expected.items():
        yield GgufTensor(
            names.get_name(name, try_suffixes=(".weight",)),
            shape,
            matrix if len(shape) > 1 else np.float32,
            lambda name=name: weights(checkpoint, name),
        )


def rope_scaling(config: LlamaConfig) -> Tensor:
    """What llama.cpp divides the frequency of each rotary pair by, (head_dim / 2,) float32."""
    plain = LlamaConfig(**{**config.to_dict(), "rope_parameters": {**config.rope_parameters, "rope_type": "default"}})
    return LlamaRotaryEmbedding(plain).inv_freq / LlamaRotaryEmbedding(config).inv_freq


def weights(checkpoint: Checkpoint, name: str) -> Tensor:
    """The named tensor as llama.cpp wants it."""
    tensor = checkpoint.read([name])[name]
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        return pairs_side_by_side(tensor, len(tensor) // checkpoint.config.head_dim)
    return tensor


def pairs_side_by_side(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads * head_dim, d) of queries or keys with each rotary pair's two rows beside each other.

    In Hugging Face's Llama the pair's rows are head_dim / 2 apart, which is how `rotate_half` takes them.
    """
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def write_tensors(writer: GGUFWriter, file: Path, tensors: list[GgufTensor]) -> None:
    for tensor in tensors:
        quantization = QUANTIZATIONS[tensor.dtype]
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(tensor.dtype), tensor.bytes, quantization)
    writer.write_header_to_file(file)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        data = tensor.read().float().numpy()
        with np.errstate(over="ignore"):
            stored = data.astype(tensor.dtype)
        if not np.isfinite(stored).all():
            raise InputError(f"{tensor.name} has weights that are no finite {np.dtype(tensor.dtype)}. Try --dtype f32.")
        writer.write_tensor_data(np.ascontiguousarray(stored))
