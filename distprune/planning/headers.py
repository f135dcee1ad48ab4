"""What a checkpoint's headers say, wherever it lies: in a folder, on the hub or in a .gguf file. No weight is read."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import AutoConfig, PretrainedConfig

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
from distprune.families import Family, family_of, with_embedding
from distprune.modeling import PrunedConfig
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
    return with_embedding(checkpoint, family_of(checkpoint.config))


def dense_model(checkpoint: Checkpoint) -> tuple[Family, PrunedConfig]:
    """The checkpoint's family and its unpruned geometry, which its tensors are seen to have.

    A head that is stored beside a tied embedding is taken for its copy: whether it is takes both tensors' data.

    Raises:
        InputError: the family is not supported, or a tensor is missing, has another shape or is one too many.
    """
    family = family_of(checkpoint.config)
    dense = family.dense_config(checkpoint.config)
    checkpoint.check_shapes(family.tensor_shapes(dense))
    if unknown := family.unknown_tensors(checkpoint.tensors, dense):
        raise InputError(
            f"{checkpoint.path}: holds tensor '{unknown[0]}', for which a {family.model_type} model with this "
            f"config.json has no place ({len(unknown)} such tensors). Merge adapters and remove extra heads first."
        )
    return family, dense


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


def _imported_tensors(path: Path, config: PretrainedConfig) -> Mapping[str, TensorInfo]:
    family, dtype = family_of(config), torch.bfloat16
    shapes = family.tensor_shapes(family.dense_config(config))
    return {
        name: TensorInfo(path, dtype, shape, math.prod(shape) * dtype.itemsize, 0) for name, shape in shapes.items()
    }
