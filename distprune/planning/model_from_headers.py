"""What a checkpoint's headers say, wherever it lies: in a folder, on the hub or in a .gguf file. No weight is read."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedConfig

from distprune.checkpoint import (
    Checkpoint,
    TensorInfo,
    find_on_hub,
    is_hub_id,
    open_on_hub,
    refuse_revision,
    resolve_model,
)
from distprune.errors import InputError
from distprune.layers.architecture import Architecture
from distprune.storage import is_url, location


def open_headers(source: str, revision: str | None = None, trust_remote_code: bool = False) -> Checkpoint:
    """A checkpoint whose configuration and tensors' shapes are known; what it names need not be on this machine.

    Raises:
        InputError: no such model, it can't be pruned, or its headers can't be had.
    """
    path = Path(source).expanduser()
    if is_url(source):
        refuse_revision(source, revision)
        checkpoint = Checkpoint.open(location(source), trust_remote_code)
    elif path.suffix.lower() == ".gguf":
        return _gguf_headers(path)
    elif is_hub_id(source):
        checkpoint = open_on_hub(find_on_hub(source, revision), trust_remote_code)
    else:
        checkpoint = Checkpoint.open(resolve_model(source, revision=revision), trust_remote_code)
    return checkpoint


def _gguf_headers(path: Path) -> Checkpoint:
    """The checkpoint that the file would be imported as: the same tensors in bfloat16."""
    if not path.is_file():
        raise InputError(f"{path} does not exist. Give the path of a .gguf file.")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"{path} needs the gguf package to be read. Install it with `pip install gguf`.")
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # the parser raises whatever the broken bytes lead to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path}: its header can't be read as GGUF ({reason}). Download it again, or use the model's safetensors "
            "release."
        ) from error
    return Checkpoint(path, config, _imported_tensors(path, config))


def _imported_tensors(path: Path, config: PreTrainedConfig) -> Mapping[str, TensorInfo]:
    architecture, dtype = Architecture(config), torch.bfloat16
    shapes = architecture.outer_tensors()
    for index in range(architecture.num_layers):
        tensors = architecture.layer_tensors(index, architecture.dense_shape(index))
        shapes |= {architecture.layer_prefix(index) + name: shape for name, shape in tensors.items()}
    return {
        name: TensorInfo(path, dtype, shape, math.prod(shape) * dtype.itemsize, 0) for name, shape in shapes.items()
    }
