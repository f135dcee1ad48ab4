"""The tensors of a Llama or a Mixtral as GGUF files hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor
from transformers import LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from distprune.checkpoint import Checkpoint
from distprune.errors import InputError
from distprune.families.disk_names import DiskNames, disk_names
from distprune.families.reading import read_tensors
from distprune.layers.architecture import Architecture
from distprune.layers.module import empty_model

QUANTIZATIONS = {np.float16: GGMLQuantizationType.F16, np.float32: GGMLQuantizationType.F32}
#: Ends of the names of what is special in a mixture of experts.
ROUTER, GATE_AND_UP = ".mlp.gate.weight", ".experts.gate_up_proj"
WEIGHT = ".weight"
OF_ROTARY_EMBEDDING = ("rope_parameters", "head_dim", "hidden_size", "num_attention_heads", "max_position_embeddings")


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
    stored = Stored(checkpoint, disk_names(empty_model(model), checkpoint))
    kind = gguf.MODEL_ARCH.DECI if architecture == "deci" else gguf.MODEL_ARCH.LLAMA
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    scaling = rope_scaling(config)
    if (scaling != 1).any():
        yield GgufTensor("rope_freqs.weight", tuple(scaling.shape), np.float32, lambda: scaling)
    matrix = np.float16 if dtype == "f16" else np.float32
    for name, shape in expected.items():
        is_exact = len(shape) == 1 or name.endswith(ROUTER)
        for own, dims, part in parts_of(name, shape):
            yield GgufTensor(
                names.get_name(own, try_suffixes=(WEIGHT,)),
                dims,
                np.float32 if is_exact else matrix,
                lambda name=name, shape=shape, part=part: part(stored.weights(name, shape)),
            )


Part = Callable[[Tensor], Tensor]


def parts_of(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    """What becomes of a tensor in the file: names that say what it is, dimensions and how to get there.

    All experts' gate and up projections are one tensor (experts, 2 · width, d) here, and two there.
    """
    if not name.endswith(GATE_AND_UP):
        yield name.removesuffix(WEIGHT) + WEIGHT, shape, lambda tensor: tensor
        return
    experts, width, hidden = shape
    for place, own in enumerate(("gate_proj", "up_proj")):
        part = partial(lambda tensor, place: tensor.chunk(2, dim=1)[place], place=place)
        yield name.replace("gate_up_proj", own) + WEIGHT, (experts, width // 2, hidden), part


def rope_scaling(config: PreTrainedConfig) -> Tensor:
    """What llama.cpp divides the frequency of each rotary pair by, (head_dim / 2,) float32."""
    said = {name: getattr(config, name) for name in OF_ROTARY_EMBEDDING}
    plain = said | {"rope_parameters": {**config.rope_parameters, "rope_type": "default"}}
    scaled, unscaled = (LlamaRotaryEmbedding(LlamaConfig(**fields)).inv_freq for fields in (said, plain))
    return unscaled / scaled


def head_dim(config: PreTrainedConfig) -> int:
    """How wide a head is, which some configurations leave to be found out."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True)
class Stored:
    """The tensors of a checkpoint, by their names in the module tree, as llama.cpp wants them."""

    checkpoint: Checkpoint
    names: DiskNames

    def weights(self, name: str, shape: tuple[int, ...]) -> Tensor:
        config = self.checkpoint.config
        tensor = read_tensors(self.checkpoint, self.names, {name: shape}, config)[name]
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            return pairs_side_by_side(tensor, len(tensor) // head_dim(config))
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
