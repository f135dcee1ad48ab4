"""Whether a checkpoint's tensors are what a model's module tree asks for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from distprune.checkpoint import Checkpoint, TensorInfo
from distprune.errors import InputError


def check_fit(checkpoint: Checkpoint, expected: Mapping[str, Tensor], tables: Collection[str]) -> None:
    """Check the tensors of the names on disk against those on the meta device; ``tables`` have a row for each token.

    Raises:
        InputError: one is missing, has another shape, or is stored in a dtype that is no floating-point one.
    """
    for name, tensor in expected.items():
        if info := checkpoint.tensors.get(name):
            if name in tables:
                _check_rows(name, info, tensor)
            _check_dtype(name, info, tensor)
    checkpoint.check_shapes({name: tuple(tensor.shape) for name, tensor in expected.items()})


def check_no_more(checkpoint: Checkpoint, names: Collection[str]) -> None:
    """Raise InputError where tensors on disk are of experts that the model doesn't have."""
    for name in names:
        raise InputError(
            f"{checkpoint.tensors[name].file}: tensor {name} is of one expert more than config.json calls for. Check "
            "that config.json belongs to these weights."
        )


def _check_rows(name: str, info: TensorInfo, table: Tensor) -> None:
    """Embeddings may have been padded, or have grown, without a word of it in config.json."""
    rows, *columns = info.shape or (0,)
    if rows != len(table) and columns == [*table.shape[1:]]:
        raise InputError(
            f"{info.file}: tensor {name} has {rows} rows, and config.json a vocab_size of {len(table)}, with which "
            f"transformers doesn't load it either. Set vocab_size to {rows} in config.json, or resize the model with "
            "resize_token_embeddings."
        )


def _check_dtype(name: str, info: TensorInfo, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not info.dtype.is_floating_point:
        raise InputError(
            f"{info.file}: tensor {name} is stored as {str(info.dtype).removeprefix('torch.')}, which can't be pruned. "
            "Write the model anew in bf16, fp16 or fp32; if it is quantized, use the release that it was made from."
        )
